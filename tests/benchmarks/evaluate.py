"""`convoy bench evaluate`: ten crops and several networks, ours against its bound and against the usual ways.

    python tests/benchmarks/evaluate.py [key=value ...]

Progress goes to stderr; the last line on stdout is the report as JSON. The keys are the fields of `EvaluateBench`.
"""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from comparison import OURS, best_way, divide, halfway, remaining_bounds, spread, with_workers
from dataloader import Variant
from equality import Equality, compare_features
from evaluate_bounds import EvaluateBounds
from evaluate_dataloader import Way
from evaluate_gated import ARCHIVE, WEIGHTS, GatedResult
from evaluate_job import CommitteeRates, EvaluateJob
from evaluate_page import write_page
from images import ImageSet, link_first, make_images, real_data
from machine import by_device, machine_facts
from measuring import BenchSettings, run_benchmark, run_script, say
from pydantic import Field, PositiveFloat, PositiveInt

from convoy.core.errors import ConvoyError


class EvaluateBench(BenchSettings):
    """What is measured.

    Every way runs `repeats` times, in turn with the others, on made images: ours on all, so that one network is
    work enough for an operator on each core, in slices of one size, the usual ways, which are slower and have
    no start to make up for, on the first `num_peer_images`. Before that the joint outputs of the first
    `num_compared` must agree.

    `archs` are all networks, `sizes` the committees of the first of them; the headlines are those of the largest.
    `workers` are the counts that the DataLoaders are tried with (null: 0 and all cores), `variants` how they run the
    networks; `compiled` is for ours. `num_gated` images of CIFAR-10 in `data` measure the gate.
    """

    archs: tuple[str, ...] = Field(
        default=(
            "torchvision:resnet18",
            "torchvision:resnet18",
            "torchvision:resnet34",
            "torchvision:resnet18",
            "torchvision:resnet18",
        ),
        min_length=1,
    )
    sizes: tuple[PositiveInt, ...] = Field(default=(1, 3, 5), min_length=1)
    crop_px: PositiveInt = Field(default_factory=lambda: by_device(128, 224))
    batch_size: PositiveInt = Field(default_factory=lambda: by_device(16, 128))
    num_images: PositiveInt = Field(default_factory=lambda: by_device(768, 8192))
    num_peer_images: PositiveInt = Field(default_factory=lambda: by_device(96, 2048))
    num_compared: PositiveInt = 8
    repeats: PositiveInt = 1
    workers: tuple[int, ...] | None = Field(default=None, min_length=1)
    variants: tuple[Variant, ...] = Field(default=(Variant.PLAIN,), min_length=1)
    probe_s: PositiveFloat = 2.0
    compiled: bool = False
    num_gated: PositiveInt = 2000
    data: str | None = None
    seed: int = Field(default=0, ge=0)

    @property
    def worker_counts(self) -> list[int]:
        """The numbers of worker processes, ascending."""
        return sorted(set(self.workers or (0, os.cpu_count() or 1)))


class EvaluateComparison:
    """All ways over the same images, each in processes of its own."""

    def __init__(self, settings: EvaluateBench, images: ImageSet, folder: Path) -> None:
        self._settings, self._images, self._folder = settings, images, folder
        self._peers = [_peer(way, variant) for way in Way for variant in settings.variants]
        self._peer_options: dict[str, dict[str, Any]] = {
            with_workers(_peer(way, variant), workers): {"way": way, "variant": variant, "workers": workers}
            for way in Way
            for variant in settings.variants
            for workers in settings.worker_counts
        }
        self._for_peers = link_first(images, folder / "for_peers", settings.num_peer_images)
        self._bounds: dict[int, list[EvaluateBounds]] = defaultdict(list)
        self._results: dict[str, list[CommitteeRates]] = defaultdict(list)

    def check_equality(self) -> dict[str, Equality]:
        """How far our float32 outputs are from the peers'. Raises ConvoyError if they are not the same."""
        compared = link_first(self._images, self._folder / "compared", self._settings.num_compared)
        say(f"comparing the joint outputs for {compared.num_images} images")
        self._run("evaluate_ours.py", OURS, compared, {"precision": "fp32"})
        found = {}
        for way in Way:
            self._run("evaluate_dataloader.py", way, compared, {"way": way})
            found[way.value] = compare_features(self._outputs_of(OURS), self._outputs_of(way))
            if not found[way].holds:
                raise ConvoyError(f"unequal outputs, so rates mean nothing: {found[way]!r}", where=way)
        return found

    def repeat(self) -> None:
        """Every way once, the bounds right before and after each of our committees."""
        before = self._run_bounds()
        for size in self._settings.sizes:
            self._measure("evaluate_ours.py", OURS, self._images, {"sizes": [size]})
            after = self._run_bounds()
            self._bounds[size].append(halfway(before, after))
            before = after
        for name, options in self._peer_options.items():
            self._measure("evaluate_dataloader.py", name, self._for_peers, options)

    def describe(self) -> dict[str, Any]:
        """By the number of networks: ratios, then the rates of every way and bound."""
        return {str(size): self._describe(size) for size in self._settings.sizes}

    def _describe(self, size: int) -> dict[str, Any]:
        measured = {
            name: [one for one in results if size in one.images_per_s]
            for name, results in self._results.items()
        }
        rates = {name: [one.images_per_s[size] for one in results] for name, results in measured.items()}
        best = {peer: best_way(rates, peer) for peer in self._peers}
        bounds = {
            "forward": [one.forward[size] for one in self._bounds[size]],
            "combined": [one.combined[size] for one in self._bounds[size]],
            "prepare": [one.prepare for one in self._bounds[size]],
        }
        shares = [one.others_share[size] for one in measured[OURS]]
        ratios = {
            "ratio_to_bound": divide(rates[OURS], bounds["forward"]),
            "ratio_to_combined_bound": divide(rates[OURS], bounds["combined"]),
            "ratio_to_remaining_bound": divide(rates[OURS], remaining_bounds(bounds["combined"], shares)),
            **{f"ratio_to_{peer}": divide(rates[OURS], rates[name]) for peer, name in best.items()},
        }
        return {
            "ratios": {name: spread(values) for name, values in ratios.items()},
            "best_workers": best,
            "images_per_s": {name: spread(values) for name, values in rates.items()},
            "bounds": {name: spread(values) for name, values in bounds.items()},
            "others_share": shares,
            "network_share": [one.network_share[size] for one in measured[OURS]],
            "precision": self._bounds[size][0].precision,
            "device": self._bounds[size][0].device,
        }

    def _run_bounds(self) -> EvaluateBounds:
        job = self._job(self._images, "bounds")
        printed = run_script("evaluate_bounds.py", **job.model_dump(), probe_s=self._settings.probe_s)
        bounds = EvaluateBounds.model_validate(printed)
        say(f"  bounds: {bounds!r}")
        return bounds

    def _measure(self, script: str, name: str, images: ImageSet, options: dict[str, Any]) -> None:
        result = self._run(script, name, images, options)
        say(f"  {name}: {result.images_per_s}")
        self._results[name].append(result)

    def _run(self, script: str, name: str, images: ImageSet, options: dict[str, Any]) -> CommitteeRates:
        printed = run_script(script, **{**self._job(images, name).model_dump(), **options})
        result = CommitteeRates.model_validate(printed)
        if result.num_images != images.num_images:
            raise ConvoyError(f"outputs of {result.num_images} images, not {images.num_images}", where=name)
        return result

    def _job(self, images: ImageSet, name: str) -> EvaluateJob:
        settings = self._settings
        return EvaluateJob(
            images=images.folder,
            outputs=self._outputs_of(name),
            archs=settings.archs[: max(settings.sizes)],
            **settings.model_dump(include={"sizes", "crop_px", "batch_size", "compiled"}),
        )

    def _outputs_of(self, name: str) -> str:
        return str(self._folder / f"{name}.npz")


def run_evaluate_bench(settings: EvaluateBench) -> dict[str, Any]:
    """The headlines of the largest committee and of the gate; then all ratios, rates, bounds and comparisons."""
    machine = machine_facts()
    with TemporaryDirectory(prefix="convoy-bench-") as folder:
        say(f"making {settings.num_images} images")
        images = make_images(Path(folder, "made"), settings.num_images, seed=settings.seed)
        comparison = EvaluateComparison(settings, images, Path(folder))
        equality = comparison.check_equality()
        for repeat in range(settings.repeats):
            say(f"repeat {repeat + 1} of {settings.repeats}")
            comparison.repeat()
        committees = comparison.describe()
    gated = _measure_gate(settings)
    largest = committees[str(max(settings.sizes))]
    return {
        **{name: ratio["median"] for name, ratio in largest["ratios"].items()},
        "gated_agreement": gated.agreement if gated else None,
        "gated_speedup": gated.speedup if gated else None,
        "committees": committees,
        "equality": {way: one.model_dump() for way, one in equality.items()},
        "gated": gated.model_dump(mode="json") if gated else f"skipped: there is no {ARCHIVE} with {WEIGHTS}",
        "images": images.model_dump(exclude={"folder"}),
        "machine": machine,
        "settings": settings.model_dump(mode="json"),
    }


def _measure_gate(settings: EvaluateBench) -> GatedResult | None:
    if real_data(ARCHIVE, settings.data) is None or real_data(WEIGHTS, settings.data) is None:
        return None
    say("measuring the gate")
    sizes = {"num_images": settings.num_gated, "batch_size": max(1, min(64, settings.num_gated // 16))}
    printed = run_script("evaluate_gated.py", data=settings.data, **sizes)
    gated = GatedResult.model_validate(printed)
    say(f"  {gated!r}")
    return gated


def _peer(way: Way, variant: Variant) -> str:
    return way.value if variant is Variant.PLAIN else f"{way.value}_{variant.value}"


if __name__ == "__main__":
    run_benchmark(EvaluateBench, run_evaluate_bench, write_page)
