"""Planning features: which sets a request needs, how the network will be run, and which rows lack what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Any

from pydantic import Field, PositiveFloat, PositiveInt

from convoy.cluster.network_device import find_device
from convoy.cluster.stall_watch import DEFAULT_STALL_MINUTES
from convoy.core.config import StrictModel
from convoy.core.errors import ConfigError
from convoy.core.splits import ChosenSplits
from convoy.pipelines.backbone_record import BackboneRecord
from convoy.storage.feature_cache import FeatureSetSpec
from convoy.storage.manifests import Manifest
from convoy.vision.augmentation_policy import AugmentationPolicy, view_recipe
from convoy.vision.backbone_config import BackboneConfig, WeightSource, weight_source
from convoy.vision.decode_rule import DecodeRule
from convoy.vision.engine_options import NetworkDevice, Precision

# torch.compile costs about half a minute a worker and saves about a sixth of the forward time (resnet18 and resnet50
# at 224 pixels on two AVX512-bf16 cores): it pays from this much forward work of a device on.
COMPILE_PAYS_FROM_S = 400.0
# Before, `pooled` was the block before the last one there.
_AXIS_WITHOUT_CLASSIFIER = 2
# Multiply-adds a second of two such cores in bf16; the forecast needs no better guess.
_MACS_PER_S = 2.5e11


class CompileChoice(StrEnum):
    """Whether workers compile the network; `auto` compiles where the forecast says that it pays, and they can."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


class PrecisionChoice(StrEnum):
    """What the network computes in; `auto` is bf16 where what computes it, a GPU or a CPU, has that natively."""

    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"


class FeatureDtype(StrEnum):
    """How features are stored."""

    FLOAT16 = "float16"
    FLOAT32 = "float32"


class ExtractionConfig(StrictModel):
    """How features are computed and stored; shared by every job that needs features.

    `batch_size` are images a pass of a network; null goes by their size and by what runs it: of 224 pixels 256 on a GPU
    with native bf16, 64 on others, 32 on CPUs. `cpus_per_worker` are the threads of each of `num_workers` operators;
    null shares out the CPUs of the cluster: without GPUs, many images get an operator of one thread for every CPU, as
    far as memory goes. `num_fetch_threads` of null are 16 an operator for images in a store, and 2 for files. What
    float16 would spoil has a `dtype` of float32 whatever is set: logits, and features of random weights under a head.
    A worker whose slice has not moved for `stall_minutes`, as where a mounted folder or a device hangs, ends, with the
    stacks of its threads in its log; another takes its place. A silent store is asked for an image for up to nine.
    """

    decode: DecodeRule = DecodeRule()
    precision: PrecisionChoice = PrecisionChoice.AUTO
    dtype: FeatureDtype = FeatureDtype.FLOAT16
    batch_size: PositiveInt | None = None
    compile: CompileChoice = CompileChoice.AUTO
    num_workers: int | None = Field(default=None, gt=0)
    cpus_per_worker: int | None = Field(default=None, gt=0)
    slice_rows: int | None = Field(default=None, gt=0)
    num_fetch_threads: PositiveInt | None = None
    stall_minutes: PositiveFloat = DEFAULT_STALL_MINUTES

    @property
    def stall_s(self) -> float:
        """`stall_minutes` as workers count them."""
        return 60 * self.stall_minutes


def holding_features(extraction: ExtractionConfig, backbone: BackboneRecord) -> ExtractionConfig:
    """The settings with a dtype that holds the features of a network.

    Activations of random weights shrink from stage to stage, to far below what float16 holds.
    """
    if weight_source(backbone.config) is not WeightSource.RANDOM:
        return extraction
    return extraction.model_copy(update={"dtype": FeatureDtype.FLOAT32})


class ErrorBudget(StrictModel):
    """How many samples may be rejected: `rows`, or `rate` of them, whichever is more, but all only at a rate of 1."""

    rate: float = Field(default=0.01, ge=0, le=1)
    rows: int = Field(default=100, ge=0)

    def allows(self, num_rejects: int, num_samples: int) -> bool:
        """Whether so many rejects among so many samples are within the budget."""
        if 0 < num_samples <= num_rejects:
            return self.rate == 1
        return num_rejects <= max(self.rows, self.rate * num_samples)


class FeatureRequest(StrictModel):
    """Which features of which samples: some taps and views of a backbone, for some splits of a dataset."""

    dataset: str
    splits: ChosenSplits | None = None
    backbone: BackboneConfig
    taps: tuple[str | int, ...] = ("pooled",)
    views: int = Field(default=1, ge=1)
    augmentation: AugmentationPolicy = AugmentationPolicy()

    @property
    def drawn_views(self) -> tuple[tuple[AugmentationPolicy, int], ...]:
        """The views of each tap, and the policy that draws them; the eval view comes first."""
        return tuple((self.augmentation, view) for view in range(self.views))


class ManyPolicies(FeatureRequest):
    """The same with further policies, each of which draws the views from 1 on: an image is decoded once for all."""

    policies: tuple[AugmentationPolicy, ...]

    @property
    def drawn_views(self) -> tuple[tuple[AugmentationPolicy, int], ...]:
        """The views of each tap, and the policy that draws them; the eval view comes first."""
        further = ((policy, view) for policy in self.policies for view in range(1, self.views))
        return tuple(dict.fromkeys((*super().drawn_views, *further)))


def plan_sets(
    backbone: BackboneRecord, request: FeatureRequest, extraction: ExtractionConfig
) -> list[FeatureSetSpec]:
    """The feature sets of a request, taps outermost; the spec of view 0 does not depend on the augmentation.

    The precision of `extraction` is one that was settled.
    """
    return [
        FeatureSetSpec(
            decode_rule=extraction.decode.model_dump(mode="json"),
            view=view,
            view_recipe=view_recipe(backbone.preset, policy, view),
            mean=backbone.preset.mean,
            std=backbone.preset.std,
            arch=backbone.arch,
            weights_digest=backbone.weights_digest,
            code_digest=backbone.config.code_digest,
            axis_version=None if backbone.num_classes else _AXIS_WITHOUT_CLASSIFIER,
            tap=backbone.resolve_tap(tap),
            precision=Precision(extraction.precision.value).value,
            dtype=extraction.dtype.value,
        )
        for tap in dict.fromkeys(request.taps)
        for policy, view in request.drawn_views
    ]


def set_labels(sets: Sequence[FeatureSetSpec]) -> list[str]:
    """`<tap>/<view>` for each set; where several policies draw that view, the set's id says which."""
    labels = [f"{spec.tap}/{spec.view}" for spec in sets]
    return [
        label if labels.count(label) == 1 else f"{label} {spec.set_id}"
        for label, spec in zip(labels, sets, strict=True)
    ]


# Who compiles: found where it matters, which may take Ray, or None where nobody was asked.
DeviceFinder = Callable[[], NetworkDevice | None]


def plan_compile(
    backbone: BackboneRecord,
    request: FeatureRequest,
    choice: CompileChoice,
    num_images: int,
    find: DeviceFinder = find_device,
) -> tuple[bool, str]:
    """Whether to compile, and the reason in words. Decided once a run, so that a resumed run computes the same."""
    return compile_decision(choice, forecast_forward_s(backbone, request, num_images), find)


def compile_decision(
    choice: CompileChoice, forecast_s: float, find: DeviceFinder = find_device
) -> tuple[bool, str]:
    """The same for so many seconds in networks on two cores, of which other devices need fewer.

    ConfigError where it must be compiled and workers cannot.
    """
    if choice is CompileChoice.NEVER:
        return False, "eager: compile is set to never"
    reason = "compile is set to always"
    # No device is slower, so what does not pay there pays nowhere, and nobody is asked.
    device = find() if choice is CompileChoice.ALWAYS or forecast_s >= COMPILE_PAYS_FROM_S else None
    if choice is CompileChoice.AUTO:
        device_s = forecast_s / (device.speed if device else 1.0)
        pays = device_s >= COMPILE_PAYS_FROM_S
        relation = "at least" if pays else "less than"
        reason = f"forecast of {device_s:.0f} s forward is {relation} {COMPILE_PAYS_FROM_S:.0f} s"
        if not pays:
            return False, f"eager: {reason}"
    if device is None:
        return True, f"compiled: {reason}, if the workers have a compiler"
    if device.has_compiler is False and choice is CompileChoice.ALWAYS:
        raise ConfigError(
            f"networks cannot be compiled: there is no {device.compilers} beside {device.name}",
            where="compile",
            next_step="install one where the workers run, or set compile to auto",
        )
    if not device.has_compiler and choice is CompileChoice.AUTO:
        return False, f"eager: no {device.compilers} was found beside {device.name}"
    return True, f"compiled: {reason}"


def forecast_forward_s(backbone: BackboneRecord, request: FeatureRequest, num_images: int) -> float:
    """Seconds in the network for so many images on two cores with native bf16, to within a factor of two."""
    macs = max(backbone.macs_to(tap) for tap in request.taps)
    return forward_s(num_images * len(request.drawn_views) * macs)


def forward_s(macs: float) -> float:
    """Seconds of so many multiply-adds on two such cores."""
    return macs / _MACS_PER_S


def run_identity(manifest: Manifest, request: FeatureRequest, sets: list[FeatureSetSpec]) -> dict[str, Any]:
    """What a resumed run must share with the run that it goes on with."""
    return {
        "dataset": request.dataset,
        "dataset_fingerprint": manifest.fingerprint,
        "splits": sorted(request.splits) if request.splits else "all",
        "sets": [spec.set_id for spec in sets],
    }
