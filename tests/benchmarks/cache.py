"""`convoy bench cache`: our job against its physical bounds and against the usual ways, on the same images.

    python tests/benchmarks/cache.py [key=value ...]

Progress goes to stderr; the last line on stdout is the report as JSON. The keys are the fields of `CacheBench`.
"""

from __future__ import annotations

import time
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
    Runs,
    describe_runs,
    halfway,
    with_workers,
)
from equality import compare_features
from images import IMAGENET_TAR, ImageSet, link_first, link_imagenet, make_images
from machine import machine_facts
from measuring import BenchSettings, WayResult, run_benchmark, run_script, say
from pydantic import Field
from results import write_results

from convoy.core.errors import ConvoyError


class ImageSource(StrEnum):
    """MADE: the same on every machine. IMAGENET: 250 real ones, where their archive is at hand."""

    MADE = "made"
    IMAGENET = "imagenet"


class CacheBench(BenchSettings):
    """What is measured.

    Every way runs `repeats` times, in turn with the others, on `num_images` made images and on `num_imagenet`
    names of real ones; the features of the first `num_compared` must agree. `workers` are the counts that the
    DataLoader is tried with, `probe_s` is how long each bound is measured, `compiled` adds the bound of the
    compiled network. `data` is the folder of the real images' archive, if it is not where the tests look;
    `results` is a Markdown file to write.
    """

    images: tuple[ImageSource, ...] = Field(default=tuple(ImageSource), min_length=1)
    num_images: int = Field(default=2000, gt=0)
    num_imagenet: int = Field(default=1000, gt=0)
    num_compared: int = Field(default=256, gt=0)
    repeats: int = Field(default=3, gt=0)
    batch_size: int = Field(default=32, gt=0)
    workers: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    probe_s: float = Field(default=4.0, gt=0)
    compiled: bool = False
    data: str | None = None
    seed: int = Field(default=0, ge=0)


class CacheComparison:
    """All ways over the same images, each in processes of its own."""

    def __init__(self, settings: CacheBench, folder: Path) -> None:
        self._settings = settings
        self._folder = folder
        self._ways: dict[str, tuple[str, dict[str, Any]]] = {
            OURS: ("ours.py", {}),
            OURS_FP32: ("ours.py", {"precision": "fp32", "dtype": "float32"}),
            RAY_DOCS: ("ray_docs.py", {}),
        }
        for way, variant in ((DATALOADER, "plain"), (DATALOADER_TUNED, "tuned")):
            for workers in settings.workers:
                options = {"workers": workers, "variant": variant}
                self._ways[with_workers(way, workers)] = ("dataloader.py", options)

    def measure(self, images: ImageSet) -> dict[str, Any]:
        """Equal outputs first, then every way in turn, the bounds right before and after our job."""
        equality = self._compare(images)
        runs = Runs()
        for repeat in range(self._settings.repeats):
            say(f"repeat {repeat + 1} of {self._settings.repeats}")
            before = self._run_bounds(images)
            for way in self._ways:
                runs.ways[way].append(self._run(way, images))
                if way == OURS_FP32:
                    runs.bounds.append(halfway(before, self._run_bounds(images)))
        return {**describe_runs(runs), "equality": equality, "images": images.model_dump()}

    def _compare(self, images: ImageSet) -> dict[str, Any]:
        """How far our float32 features are from the peers'. Raises ConvoyError if they are not the same."""
        compared = link_first(images, self._folder / "compared", self._settings.num_compared)
        peers = {RAY_DOCS: RAY_DOCS, DATALOADER: with_workers(DATALOADER, self._settings.workers[0])}
        say(f"comparing the features of {compared.num_images} images")
        self._run(OURS_FP32, compared)
        found = {}
        for peer, way in peers.items():
            self._run(way, compared)
            equality = compare_features(self._features_of(OURS_FP32), self._features_of(way))
            if not equality.holds:
                raise ConvoyError(f"unequal features, so rates mean nothing: {equality!r}", where=peer)
            found[peer] = equality.model_dump()
        return found

    def _run(self, way: str, images: ImageSet) -> WayResult:
        script, options = self._ways[way]
        shared = {"images": images.folder, "batch_size": self._settings.batch_size}
        outputs = {"features": self._features_of(way), "launched_unix_s": time.time()}
        printed = run_script(script, **shared, **options, **outputs)
        result = WayResult.model_validate(printed)
        if result.num_images != images.num_images:
            raise ConvoyError(f"features of {result.num_images} images, not {images.num_images}", where=way)
        say(f"  {way}: {result.images_per_s:.1f} images/s, first row after {result.first_row_s:.1f} s")
        return result

    def _run_bounds(self, images: ImageSet) -> Bounds:
        keys = {"batch_size", "probe_s", "compiled"}
        options = self._settings.model_dump(include=keys)
        bounds = Bounds.model_validate(run_script("bounds.py", images=images.folder, **options))
        say(f"  bounds: {bounds!r}")
        return bounds

    def _features_of(self, way: str) -> str:
        return str(self._folder / f"{way}.npz")


def run_cache_bench(settings: CacheBench) -> dict[str, Any]:
    """The median ratios of the first image set; then of each set all ratios, rates, bounds and comparisons."""
    machine = machine_facts()
    sets: dict[str, Any] = {}
    for source in settings.images:
        say(f"images: {source}")
        with TemporaryDirectory(prefix="convoy-bench-") as folder:
            images = _open_images(source, settings, Path(folder))
            if images is None:
                where = "`data`, CONVOY_TEST_DATA or ../shared/data"
                sets[source] = {"skipped": f"there is no {IMAGENET_TAR} in {where}"}
            else:
                sets[source] = CacheComparison(settings, Path(folder)).measure(images)
    first = next((report for report in sets.values() if "ratios" in report), None)
    if first is None:
        reasons = "; ".join(report["skipped"] for report in sets.values())
        raise ConvoyError(f"no images to measure with: {reasons}", next_step="add `made` to images")
    return {
        **{name: ratio["median"] for name, ratio in first["ratios"].items()},
        "first_row_s": first["ways"][OURS]["first_row_s"]["median"],
        "sets": sets,
        "machine": machine,
        "settings": settings.model_dump(mode="json"),
    }


def _open_images(source: ImageSource, settings: CacheBench, folder: Path) -> ImageSet | None:
    if source is ImageSource.MADE:
        return make_images(folder / source, settings.num_images, seed=settings.seed)
    return link_imagenet(folder / source, settings.num_imagenet, data=settings.data)


if __name__ == "__main__":
    run_benchmark(CacheBench, run_cache_bench, write_results)
