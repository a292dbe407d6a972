"""What a search needs before its first trial: what names mean, networks in the workspace, a budget that can suffice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import Field

from convoy.cluster.network_device import find_device
from convoy.cluster.nodes import worker_nodes
from convoy.core.config import StrictModel
from convoy.core.crop_policies import CropPlan
from convoy.core.errors import ConfigError, DataError, StorageError
from convoy.core.fingerprints import digest
from convoy.core.records import Split
from convoy.pipelines.backbone_record import BackboneRecord
from convoy.pipelines.classifiers import Strategy
from convoy.pipelines.distillation import pinned_teacher
from convoy.pipelines.feature_plan import PrecisionChoice, forward_s
from convoy.pipelines.models import fetch_backbone
from convoy.pipelines.network_plan import planned_batch_bytes
from convoy.pipelines.train import first_network
from convoy.pipelines.train_config import NETWORKS, TrainConfig
from convoy.pipelines.training_rows import has_labels
from convoy.pipelines.trial_outcomes import kept_crops
from convoy.pipelines.tune_config import TuneConfig
from convoy.pipelines.wanted_training import wanted_phases, wanted_recipe
from convoy.storage.manifests import Manifest
from convoy.storage.object_store import ObjectStore
from convoy.vision.backbone_config import BackboneConfig, WeightSource, weight_source
from convoy.vision.factories import with_pinned_code
from convoy.vision.training_config import Phase

# A pass backward costs about two passes forward.
_PASSES_A_TRAINED_IMAGE = 3
# The forecast is for two cores, and true to within a factor of two.
_FORECAST_CPUS, _FORECAST_FACTOR = 2, 2


class SearchPins(StrictModel):
    """What names and files mean in all trials of a search, as it began: its run record keeps it.

    `precision` is what `auto` means, and `precision_note` why. `teachers` are bundles by digest, by what the config
    calls them. `weights` are keys of copies in the workspace, by `network_key`, of the files that networks begin with.
    Where a search began without a word on one of them, each call or trial decides.
    """

    precision: PrecisionChoice = PrecisionChoice.AUTO
    precision_note: str | None = None
    teachers: dict[str, str] = Field(default_factory=dict)
    weights: dict[str, str] = Field(default_factory=dict)

    @property
    def notes(self) -> list[str]:
        """What was found for them."""
        precision = [] if self.precision_note is None else [f"where it is auto, {self.precision_note}"]
        return precision + [
            f"the teacher of all trials is {bundle}: what {name} was when the search began"
            for name, bundle in self.teachers.items()
            if name != bundle
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A training that the search may come to, and its network in the workspace."""

    training: TrainConfig
    network: BackboneRecord


def pin_names(store: ObjectStore, manifest: Manifest, config: TuneConfig) -> SearchPins:
    """What a search means that begins now; its networks are in the workspace then.

    Raises DataError for a teacher that does not exist, ConfigError for one that lacks a class of the dataset, for
    weights that do not fit their network and what `check_crops` raises, before the search is recorded.
    """
    pins = resolve_names(store, manifest, config)
    # The last, as a cluster may have to start a machine for it.
    device = find_device()
    precision = PrecisionChoice(device.precision.value)
    return pins.model_copy(update={"precision": precision, "precision_note": device.precision_note})


def moved_names(store: ObjectStore, manifest: Manifest, config: TuneConfig, pins: SearchPins) -> list[str]:
    """Which teachers and files of weights are others now than a search has pinned, in words.

    None where one of them cannot be read any more: what the search has found stays. Raises ConfigError where
    `pin_names` does.
    """
    if not (pins.teachers or pins.weights):
        return []
    try:
        now = resolve_names(store, manifest, config)
    except (DataError, StorageError):
        return []
    moved = [
        f"the teacher {name} is {bundle}"
        for name, bundle in now.teachers.items()
        if pins.teachers.get(name, bundle) != bundle
    ]
    if any(pins.weights.get(network, key) != key for network, key in now.weights.items()):
        moved.append("a file of weights has other contents")
    return moved


def resolve_names(store: ObjectStore, manifest: Manifest, config: TuneConfig) -> SearchPins:
    """What teachers and files of weights are now; networks are in the workspace then. Raises as `pin_names` does."""
    names = dict.fromkeys(one.distill.teacher for one in config.examples() if one.distill is not None)
    teachers = {name: pinned_teacher(store, manifest, name) for name in names}
    examples = fetch_networks(store, manifest, config, {})
    check_crops(config, examples)
    return SearchPins(teachers=teachers, weights=copied_weights(examples))


def fetch_networks(
    store: ObjectStore, manifest: Manifest, config: TuneConfig, weights: Mapping[str, str]
) -> list[Example]:
    """Examples of the space: one for each network, batch, and what says how long it trains.

    The networks are in the workspace then. `weights` are the copies that stand for files, as in `SearchPins`. Raises
    ConfigError for weights that do not fit their network.
    """
    records: dict[str, BackboneRecord] = {}
    examples: dict[str, Example] = {}
    for training in config.examples():
        wanted = first_network(training, manifest)
        copy = weights.get(network_key(wanted))
        if copy is not None:
            wanted = wanted.model_copy(update={"weights": store.uri(copy)})
        name = digest(wanted)
        if name not in records:
            records[name] = fetch_backbone(store, wanted)
        recipe = wanted_recipe(training)
        batch = [recipe.batch_size, recipe.batch_unit]
        length = [
            training.epochs,
            training.freeze_depth,
            training.phases,
            training.head_source,
            recipe.patience_epochs,
        ]
        kind = digest([name, training.strategy, *length, training.rows, *batch])
        examples.setdefault(kind, Example(training=training, network=records[name]))
    return list(examples.values())


def code_digests(config: TuneConfig) -> dict[str, str]:
    """For each factory of the space the digest of its code: trials on all nodes are to have the same."""
    pinned = (with_pinned_code(training.backbone) for training in config.examples())
    return {backbone.arch: backbone.code_digest for backbone in pinned if backbone.code_digest is not None}


def copied_weights(examples: Sequence[Example]) -> dict[str, str]:
    """For each network whose weights come from a file, by `network_key`: the key of their copy in the workspace."""
    return {
        network_key(example.training.backbone): example.network.weights_key
        for example in examples
        if weight_source(example.training.backbone) is WeightSource.URI
    }


def network_key(backbone: BackboneConfig) -> str:
    """A name of the network and its first weights, whatever images it is shown."""
    return digest(backbone.model_dump(mode="json", exclude={"preset"}))


def most_batch_bytes(examples: Sequence[Example], num_workers: int) -> int:
    """Bytes of the images of the largest batch that a worker of any trial gets; 0 where no trial trains a network."""
    return max(
        (
            planned_batch_bytes(one.training, one.network.preset, num_workers)
            for one in examples
            if one.training.strategy in NETWORKS
        ),
        default=0,
    )


def require_validation_rows(manifest: Manifest) -> None:
    """Raise ConfigError where no labelled row can tell trials apart."""
    if not has_labels(manifest, Split.VAL):
        raise ConfigError(
            "trials are compared on labelled validation rows, and the dataset has none",
            where=manifest.uri,
            next_step="freeze it with --set splits.val_fraction=0.1, label its split `val`, or set folds",
        )


def check_crops(config: TuneConfig, examples: Sequence[Example]) -> None:
    """Raise ConfigError where the ensemble is to choose among crops that some network's predictions do not keep."""
    for example in examples:
        config.ensemble.policies(CropPlan(policy=kept_crops(config.crops, example.network.preset)))


def check_budget(
    config: TuneConfig, examples: Sequence[Example], manifest: Manifest, nodes: Sequence[Mapping[str, float]]
) -> None:
    """Raise ConfigError if even the shortest trial takes longer than the budget, by a forecast that errs on its side.

    There is none on GPUs, nor of trials that train no network or a part of one.
    """
    allowed_s = config.budget.seconds
    if allowed_s is None or any(node["GPU"] for node in worker_nodes(nodes)):
        return
    speed = _FORECAST_FACTOR * max(1.0, sum(node["CPU"] for node in nodes) / _FORECAST_CPUS)
    shortest_s = min(least_training_s(example, manifest) for example in examples) / speed
    if shortest_s > allowed_s:
        raise ConfigError(
            f"the budget of {allowed_s:,.0f} s is too small for one trial, which takes {shortest_s:,.0f} s or more",
            where="budget",
            next_step="raise budget.hours or budget.cost_usd, or search over fewer epochs or smaller networks",
        )


def least_training_s(example: Example, manifest: Manifest) -> float:
    """The least seconds of a training on two cores, in the network alone.

    0 where features may lie in the cache, and for a part of a network, which may be a small one.
    """
    training, num_rows = example.training, manifest.counts[Split.TRAIN].num_samples
    if training.strategy not in (Strategy.FINE_TUNE, Strategy.FROM_SCRATCH):
        return 0.0
    if training.rows.max_per_class is not None:
        num_rows = min(num_rows, training.rows.max_per_class * len(manifest.classes))
    first, *others = wanted_phases(training, wanted_recipe(training))
    if first.freeze_depth == 0 or not training.may_fit_head:
        # Else it may be of the head alone, which is fitted on features.
        others.append(first)
    passes = sum(_least_passes(phase, example) for phase in others)
    return forward_s(num_rows * passes * example.network.macs)


def _least_passes(phase: Phase, example: Example) -> float:
    """How many passes forward, at the preset's size, a phase costs an image: in as few epochs as may be."""
    patience, crop_px = wanted_recipe(example.training).patience_epochs, example.network.preset.crop_px
    epochs = phase.epochs if patience is None else min(phase.epochs, patience + 1)
    # Behind frozen stages little may be left to go back through.
    passes = _PASSES_A_TRAINED_IMAGE if phase.freeze_depth == 0 else 1
    return epochs * passes * ((phase.resolution_px or crop_px) / crop_px) ** 2
