"""`convoy bench score`: our scoring against its bounds and the usual ways, by what takes the time.

    python tests/benchmarks/score.py [key=value ...]

Progress goes to stderr; the last line on stdout is the report as JSON. The keys are the fields of `ScoreBench`.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bounds import Bounds
from comparison import (
    DATALOADER,
    DATALOADER_TUNED,
    OURS,
    OURS_FP32,
    RAY_DOCS,
    best_way,
    describe_way,
    divide,
    halfway,
    remaining_bounds,
    spread,
    with_workers,
)
from equality import compare_features
from images import ImageSet, link_first, make_images, make_large_images, repeat_images
from machine import by_device, machine_facts
from measuring import BenchSettings, WayResult, run_benchmark, run_script, say
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from score_network import RESNET_18, ScoredNetwork
from score_page import write_page
from score_swift import gets_per_second, swift_copy

from convoy.core.config import StrictModel
from convoy.core.errors import ConvoyError
from convoy.vision.engine_options import Precision

TIMM, OURS_ON_SWIFT = "timm", "ours_on_swift"
# Distinct ones: making an image of 12 megapixels takes seconds.
_NUM_DISTINCT, _NUM_LARGE = 1024, 8
_PEERS = {
    DATALOADER: {"variant": "plain"},
    DATALOADER_TUNED: {"variant": "tuned"},
    TIMM: {"library": "timm"},
}


class Regime(StrEnum):
    """What takes the time. COMPUTE: the network. DATA: JPEGs of 500x375. LARGE: JPEGs of 12 megapixels.

    BALANCED: the network as long as its JPEGs of 500x375, on a machine without GPU.
    """

    COMPUTE = "compute"
    BALANCED = "balanced"
    DATA = "data"
    LARGE = "large"


class Storage(StrEnum):
    """Where images and workspace lie. SWIFT: on an S3 server of this machine, for our job only."""

    LOCAL = "local"
    SWIFT = "swift"


class Workload(StrictModel):
    """Which network sees how many images, in batches of what size."""

    network: ScoredNetwork
    num_images: PositiveInt
    batch_size: PositiveInt


_LENET = ScoredNetwork(arch="lenet5", resize_px=32, crop_px=32)
_SMALL_RESNET_18 = ScoredNetwork(arch=RESNET_18.arch, resize_px=96, crop_px=80)


def _workload(network: ScoredNetwork, *, cpu: tuple[int, int], gpu: tuple[int, int]) -> Workload:
    """So many images in batches of that size, by where the network runs."""
    num_images, batch_size = (by_device(*one) for one in zip(cpu, gpu, strict=True))
    return Workload(network=network, num_images=num_images, batch_size=batch_size)


def _workloads() -> dict[Regime, Workload]:
    return {
        Regime.COMPUTE: _workload(RESNET_18, cpu=(2048, 32), gpu=(32768, 256)),
        Regime.BALANCED: _workload(_SMALL_RESNET_18, cpu=(8192, 64), gpu=(32768, 256)),
        Regime.DATA: _workload(_LENET, cpu=(16384, 128), gpu=(32768, 256)),
        Regime.LARGE: _workload(_LENET, cpu=(128, 8), gpu=(512, 8)),
    }


class ScoreBench(BenchSettings):
    """What is measured.

    Every way runs `repeats` times, in turn with the others; the logits of the first `num_compared` images must
    agree. `workers` are the counts that the DataLoaders are tried with (null: 0 and all cores), `probe_s` is how
    long each bound is measured, `storages` has `local` in it.
    """

    regimes: tuple[Regime, ...] = Field(default=tuple(Regime), min_length=1)
    compute: Workload
    balanced: Workload
    data: Workload
    large: Workload
    storages: tuple[Storage, ...] = (Storage.LOCAL,)
    num_compared: PositiveInt = 64
    repeats: PositiveInt = 3
    workers: tuple[NonNegativeInt, ...] | None = Field(default=None, min_length=1)
    probe_s: PositiveFloat = 4.0
    seed: NonNegativeInt = 0

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """Take what is not said of a regime from its usual workload."""
        usual = {regime.value: workload.model_dump() for regime, workload in _workloads().items()}
        return {**settings, **{name: _merged(one, settings.get(name, {})) for name, one in usual.items()}}

    def workload(self, regime: Regime) -> Workload:
        """That of a regime."""
        workload: Workload = getattr(self, regime.value)
        return workload

    @property
    def worker_counts(self) -> list[int]:
        """The numbers of worker processes, ascending."""
        return sorted(set(self.workers or (0, os.cpu_count() or 1)))


def _merged(usual: dict[str, Any], given: Any) -> Any:
    """The given settings, and what they leave out as usual."""
    if not isinstance(given, dict):
        return given
    inner = {
        name: _merged(usual[name], one) for name, one in given.items() if isinstance(usual.get(name), dict)
    }
    return {**usual, **given, **inner}


class ScoreComparison:
    """All ways of one regime over the same images, each in processes of its own."""

    def __init__(self, settings: ScoreBench, workload: Workload, images: ImageSet, folder: Path) -> None:
        self._settings, self._workload, self._images, self._folder = settings, workload, images, folder
        self._ways: dict[str, tuple[str, dict[str, Any]]] = {
            OURS: ("score_ours.py", {}),
            RAY_DOCS: ("ray_docs.py", {}),
        }
        for peer, options in _PEERS.items():
            for workers in settings.worker_counts:
                self._ways[with_workers(peer, workers)] = ("dataloader.py", {**options, "workers": workers})
        self._bounds: list[Bounds] = []
        self._swift_gets: list[float] = []
        self._results: dict[str, list[WayResult]] = defaultdict(list)

    def check_equality(self) -> dict[str, Any]:
        """How far our float32 logits are from the peers'. Raises ConvoyError if they are not the same."""
        compared = link_first(self._images, self._folder / "compared", self._settings.num_compared)
        say(f"comparing the logits for {compared.num_images} images")
        self._run(OURS_FP32, compared, ("score_ours.py", {"precision": "fp32"}))
        first_count = self._settings.worker_counts[0]
        found = {}
        for peer in (RAY_DOCS, with_workers(DATALOADER, first_count), with_workers(TIMM, first_count)):
            self._run(peer, compared, self._ways[peer])
            found[peer] = compare_features(self._outputs_of(OURS_FP32), self._outputs_of(peer))
            if not found[peer].holds:
                raise ConvoyError(f"unequal logits, so rates mean nothing: {found[peer]!r}", where=peer)
        return {peer: equality.model_dump() for peer, equality in found.items()}

    def repeat(self) -> None:
        """Every way once, the bounds right before and after ours."""
        before = self._run_bounds()
        for name, way in self._ways.items():
            self._results[name].append(self._run(name, self._images, way))
            if name == OURS:
                self._bounds.append(halfway(before, self._run_bounds()))

    def run_on_swift(self, root: str) -> None:
        """Our job once, with a copy of the images and the workspace on an S3 server, and what its reads alone take."""
        self._swift_gets.append(gets_per_second(self._settings.probe_s))
        copied = self._images.model_copy(update={"folder": f"{root}/images"})
        way = ("score_ours.py", {"root": root})
        self._results[OURS_ON_SWIFT].append(self._run(OURS_ON_SWIFT, copied, way))

    def describe(self) -> dict[str, Any]:
        """Ratios first, then for every way and bound the lowest, median and highest value, and all of them."""
        rates = {name: [one.images_per_s for one in results] for name, results in self._results.items()}
        best = {peer: best_way(rates, peer) for peer in _PEERS}
        # What `auto` means here.
        precision = Precision(machine_facts()["auto_precision"])
        bounds = {
            **{name: [getattr(one, name) for one in self._bounds] for name in ("get", "prepare", "write")},
            "forward": [one.forward(precision) for one in self._bounds],
        }
        slowest = [min(stages) for stages in zip(*bounds.values(), strict=True)]
        combined = [one.combined(precision) for one in self._bounds]
        shares = [one.details["others_share"] for one in self._results[OURS]]
        ratios = {
            "ratio_to_bound": divide(rates[OURS], slowest),
            "ratio_to_combined_bound": divide(rates[OURS], combined),
            "ratio_to_remaining_bound": divide(rates[OURS], remaining_bounds(combined, shares)),
            "ratio_to_ray_docs": divide(rates[OURS], rates[RAY_DOCS]),
            **{f"ratio_to_{peer}": divide(rates[OURS], rates[name]) for peer, name in best.items()},
        }
        if OURS_ON_SWIFT in rates:
            ratios["swift_ratio_to_local"] = divide(rates[OURS_ON_SWIFT], rates[OURS])
            bounds["get_from_swift"] = self._swift_gets
            swift_bounds = [min(stages) for stages in zip(slowest, self._swift_gets, strict=True)]
            ratios["swift_ratio_to_bound"] = divide(rates[OURS_ON_SWIFT], swift_bounds)
        return {
            "ratios": {name: spread(values) for name, values in ratios.items()},
            "best_workers": best,
            "ways": {name: describe_way(results) for name, results in self._results.items()},
            "bounds": {name: spread(values) for name, values in {**bounds, "combined": combined}.items()},
            "images": self._images.model_dump(exclude={"folder"}),
            "workload": self._workload.model_dump(mode="json"),
        }

    def _run_bounds(self) -> Bounds:
        options = {"batch_size": self._workload.batch_size, "probe_s": self._settings.probe_s}
        network = self._workload.network.model_dump()
        bounds = Bounds.model_validate(
            run_script("bounds.py", images=self._images.folder, network=network, **options)
        )
        say(f"  bounds: {bounds!r}")
        return bounds

    def _run(self, name: str, images: ImageSet, way: tuple[str, dict[str, Any]]) -> WayResult:
        script, options = way
        printed = run_script(
            script,
            images=images.folder,
            features=self._outputs_of(name),
            batch_size=min(self._workload.batch_size, max(images.num_images // 2, 1)),
            network=self._workload.network.model_dump(),
            launched_unix_s=time.time(),
            **options,
        )
        result = WayResult.model_validate(printed)
        if result.num_images != images.num_images:
            raise ConvoyError(f"logits of {result.num_images} images, not {images.num_images}", where=name)
        say(f"  {name}: {result.images_per_s:.1f} images/s, first row after {result.first_row_s:.1f} s")
        return result

    def _outputs_of(self, name: str) -> str:
        return str(self._folder / f"{name}.npz")


def run_score_bench(settings: ScoreBench) -> dict[str, Any]:
    """The headlines of each regime; then all its ratios, rates, bounds and comparisons."""
    machine = machine_facts()
    measured = {regime.value: _measure(settings, regime) for regime in settings.regimes}
    return {
        **{regime: _headlines(one) for regime, one in measured.items()},
        "measured": measured,
        "machine": machine,
        "settings": settings.model_dump(mode="json"),
    }


def _measure(settings: ScoreBench, regime: Regime) -> dict[str, Any]:
    workload = settings.workload(regime)
    with TemporaryDirectory(prefix="convoy-bench-") as folder:
        say(f"{regime}: making {workload.num_images} images")
        images = _made_images(settings, regime, Path(folder))
        comparison = ScoreComparison(settings, workload, images, Path(folder))
        equality = comparison.check_equality()
        on_swift = Storage.SWIFT in settings.storages
        with swift_copy(images, Path(folder, "swift")) if on_swift else nullcontext() as root:
            for repeat in range(settings.repeats):
                say(f"repeat {repeat + 1} of {settings.repeats}")
                comparison.repeat()
                if root is not None:
                    comparison.run_on_swift(root)
        return {**comparison.describe(), "equality": equality}


def _made_images(settings: ScoreBench, regime: Regime, folder: Path) -> ImageSet:
    num_images = settings.workload(regime).num_images
    if regime is Regime.LARGE:
        made = make_large_images(folder / "distinct", min(num_images, _NUM_LARGE), seed=settings.seed)
    else:
        made = make_images(folder / "distinct", min(num_images, _NUM_DISTINCT), seed=settings.seed)
    return repeat_images(made, folder / "made", num_images)


def _headlines(measured: dict[str, Any]) -> dict[str, Any]:
    ours = measured["ways"][OURS]
    return {
        **{name: ratio["median"] for name, ratio in measured["ratios"].items()},
        "first_row_s": ours["first_row_s"]["median"],
        "others_share": ours["details"][-1]["others_share"],
        "memory_growth": ours["details"][-1]["memory_growth"],
    }


if __name__ == "__main__":
    run_benchmark(ScoreBench, run_score_bench, write_page)
