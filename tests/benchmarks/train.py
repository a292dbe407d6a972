"""`convoy bench train`: our training against its bounds and against torchvision's loop, and the head's two ways.

    python tests/benchmarks/train.py [key=value ...]

Progress goes to stderr; the last line on stdout is the report as JSON. The keys are the fields of `TrainBench`.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from comparison import DATALOADER, DATALOADER_TUNED, OURS, best_way, divide, spread, with_workers
from images import ImageSet, make_images
from machine import by_device, machine_facts
from measuring import BenchSettings, RateResult, convoy, run_benchmark, run_script, say
from pydantic import Field, NonNegativeFloat, PositiveInt
from train_bounds import TrainBounds
from train_equality import MAX_RELATIVE_DIFFERENCE, LossEquality
from train_head import HeadEpochs
from train_job import NUM_TEST_IMAGES, TrainJob, link_classes
from train_page import write_page

from convoy.core.config import StrictModel
from convoy.core.errors import ConvoyError

COMPUTE, DATA = "compute", "data"
_HEADLINES = {"ratio_to_mock_loader": COMPUTE, "ratio_to_dataloader": DATA}


class Workload(StrictModel):
    """A network and how it is trained: `epochs` over `num_images`, the first of which is not timed.

    Without `resize_px` the eval view shows as much of an image as ImageNet's presets do.
    """

    arch: str
    crop_px: PositiveInt
    resize_px: PositiveInt | None = None
    batch_size: PositiveInt
    num_images: PositiveInt
    epochs: int = Field(default=3, ge=2)


class ComputeBound(Workload):
    """The network is what takes time. Smaller without a GPU, so that a repeat ends in minutes."""

    arch: str = "torchvision:resnet18"
    crop_px: PositiveInt = Field(default_factory=lambda: by_device(128, 224))
    batch_size: PositiveInt = Field(default_factory=lambda: by_device(32, 256))
    num_images: PositiveInt = Field(default_factory=lambda: by_device(384, 8192))


class DataBound(Workload):
    """The images are what takes time: the network is tiny, they are not."""

    arch: str = "lenet5"
    crop_px: PositiveInt = 32
    resize_px: PositiveInt | None = 32
    batch_size: PositiveInt = Field(default_factory=lambda: by_device(32, 256))
    num_images: PositiveInt = Field(default_factory=lambda: by_device(4096, 8192))


class TrainBench(BenchSettings):
    """What is measured.

    Every way of both workloads runs `repeats` times, in turn with the others, on made images; before that the
    first `compared_steps` losses must agree to within `tolerance`. `workers` are the counts that the DataLoader
    is tried with; null: 0, 1, 2, and half and all of the cores. `results` is a Markdown file to write.
    """

    compute: ComputeBound = ComputeBound()
    data: DataBound = DataBound()
    repeats: PositiveInt = 3
    workers: tuple[int, ...] | None = Field(default=None, min_length=1)
    compared_steps: PositiveInt = 5
    tolerance: NonNegativeFloat = MAX_RELATIVE_DIFFERENCE
    seed: int = Field(default=0, ge=0)

    @property
    def worker_counts(self) -> list[int]:
        """The numbers of worker processes, ascending."""
        cores = os.cpu_count() or 1
        return sorted(set(self.workers or (0, 1, 2, cores // 2, cores)))


class TrainComparison:
    """All ways to do one workload, each in processes of its own."""

    def __init__(self, settings: TrainBench, workload: Workload, job: TrainJob) -> None:
        self._settings, self._job = settings, job
        self._num_images = workload.epochs * workload.num_images
        self._ways: dict[str, tuple[str, dict[str, Any]]] = {OURS: ("train_ours.py", {})}
        for way, variant in ((DATALOADER, "plain"), (DATALOADER_TUNED, "tuned")):
            for workers in settings.worker_counts:
                options = {"workers": workers, "variant": variant}
                self._ways[with_workers(way, workers)] = ("train_dataloader.py", options)
        self._bounds: list[TrainBounds] = []
        self._results: dict[str, list[RateResult]] = defaultdict(list)

    def check_equality(self) -> LossEquality:
        """The first losses, ours and a plain loop's. Raises ConvoyError with both if they are not the same."""
        say(f"comparing the first losses: {self._job.arch}")
        options = {"steps": self._settings.compared_steps, "tolerance": self._settings.tolerance}
        return LossEquality.model_validate(
            run_script("train_equality.py", **self._job.model_dump(), **options)
        )

    def repeat(self) -> None:
        """Every way once, the bounds right before our job."""
        bounds = TrainBounds.model_validate(run_script("train_bounds.py", **self._job.model_dump()))
        say(f"  {self._job.dataset}, bounds: {bounds!r}")
        self._bounds.append(bounds)
        for way, (script, options) in self._ways.items():
            result = RateResult.model_validate(run_script(script, **self._job.model_dump(), **options))
            say(f"  {self._job.dataset}, {way}: {result.images_per_s:.1f} images/s")
            if result.num_images != self._num_images:
                raise ConvoyError(f"trained on {result.num_images} images in all", where=way)
            self._results[way].append(result)

    def describe(self) -> dict[str, Any]:
        """Ratios first, then for every way and bound the lowest, median and highest rate, and all of them."""
        rates = {way: [one.images_per_s for one in results] for way, results in self._results.items()}
        best = {way: best_way(rates, way) for way in (DATALOADER, DATALOADER_TUNED)}
        bounds = {
            name: [getattr(one, name) for one in self._bounds]
            for name in ("mock_loader", "loader", "combined")
        }
        ratios = {
            "ratio_to_mock_loader": divide(rates[OURS], bounds["mock_loader"]),
            "ratio_to_combined_bound": divide(rates[OURS], bounds["combined"]),
            **{f"ratio_to_{way}": divide(rates[OURS], rates[name]) for way, name in best.items()},
        }
        return {
            "ratios": {name: spread(values) for name, values in ratios.items()},
            "best_workers": best,
            "images_per_s": {way: spread(values) for way, values in rates.items()},
            "bounds": {name: spread(values) for name, values in bounds.items()},
            "wall_s": {
                way: spread([one.wall_s for one in results]) for way, results in self._results.items()
            },
            "ours": [one.details for one in self._results[OURS]],
            "precision": self._bounds[0].precision,
            "num_threads": self._bounds[0].num_threads,
            "device": self._bounds[0].device,
        }


def run_train_bench(settings: TrainBench) -> dict[str, Any]:
    """The headline medians; then of each workload all ratios, rates, bounds and losses; then the head's passes."""
    machine = machine_facts()
    with TemporaryDirectory(prefix="convoy-bench-") as folder:
        images = _make_images(settings, Path(folder, "made"))
        workloads: dict[str, Workload] = {COMPUTE: settings.compute, DATA: settings.data}
        jobs = {name: _freeze(workload, name, images, Path(folder)) for name, workload in workloads.items()}
        comparisons = {name: TrainComparison(settings, workloads[name], job) for name, job in jobs.items()}
        equality = {name: one.check_equality() for name, one in comparisons.items()}
        head: list[HeadEpochs] = []
        for repeat in range(settings.repeats):
            say(f"repeat {repeat + 1} of {settings.repeats}")
            for comparison in comparisons.values():
                comparison.repeat()
            head.append(HeadEpochs.model_validate(run_script("train_head.py", **jobs[COMPUTE].model_dump())))
            say(f"  head: {head[-1]!r}")
        measured = {
            name: {
                **comparison.describe(),
                "equality": {
                    **equality[name].model_dump(),
                    "max_relative_difference": equality[name].max_relative_difference,
                },
            }
            for name, comparison in comparisons.items()
        }
    return {
        **{name: measured[workload]["ratios"][name]["median"] for name, workload in _HEADLINES.items()},
        "head_epoch_speedup_from_cache": spread([one.speedup for one in head])["median"],
        "workloads": measured,
        "head": _describe_head(head),
        "images": images.model_dump(exclude={"folder"}),
        "machine": machine,
        "settings": settings.model_dump(mode="json"),
    }


def _make_images(settings: TrainBench, folder: Path) -> ImageSet:
    """Enough for both workloads, which share them, and for the held-out rows."""
    num_images = max(settings.compute.num_images, settings.data.num_images) + NUM_TEST_IMAGES
    say(f"making {num_images} images")
    return make_images(folder, num_images, seed=settings.seed)


def _freeze(workload: Workload, name: str, images: ImageSet, folder: Path) -> TrainJob:
    """A dataset of class folders for a workload, in a workspace that both share."""
    tree = link_classes(images, folder / name, workload.num_images)
    workspace = str(folder / "workspace")
    # No validation rows: peers have none either.
    convoy("dataset", str(tree), "--name", name, "--workspace", workspace, "--set", "splits.val_fraction=0")
    return TrainJob(
        workspace=workspace,
        dataset=name,
        images=str(tree),
        arch=workload.arch,
        crop_px=workload.crop_px,
        resize_px=workload.resize_px or round(workload.crop_px * 256 / 224),
        batch_size=workload.batch_size,
        epochs=workload.epochs,
    )


def _describe_head(head: Sequence[HeadEpochs]) -> dict[str, Any]:
    return {
        **{
            name: spread([getattr(one, name) for one in head])
            for name in ("cached_s", "network_s", "speedup")
        },
        "num_rows": head[0].num_rows,
        "num_passes": head[0].num_passes,
    }


if __name__ == "__main__":
    run_benchmark(TrainBench, run_train_bench, write_page)
