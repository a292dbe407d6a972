"""A small real cache job, or another one on its dataset, run by the command line."""

from __future__ import annotations

import shutil
import subprocess
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from command_lines import convoy, convoy_here, convoy_json, convoy_json_here, settings_arguments
from convoy.storage.feature_cache import FeatureCache
from convoy.storage.feature_reading import features_array
from convoy.storage.runs import parse_slice_name
from convoy.storage.stores import open_store

LENET = "{arch: lenet5, weights: random, preset: {resize_px: null, crop_px: 32}}"


def freeze(source: str | Path, workspace: str, name: str = "digits") -> dict[str, Any]:
    """Freeze a source as a dataset, or refresh the dataset."""
    return convoy_json_here("dataset", str(source), "--name", name, "--workspace", workspace)


def write_digits(folder: Path, num_images: int, *, start: int = 0) -> None:
    """Real handwritten digits as JPEG class folders."""
    digits = load_digits()
    for index in range(start, start + num_images):
        path = folder / str(digits.target[index]) / f"{index:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        grey = Image.fromarray((digits.images[index] * 15).astype(np.uint8))
        grey.resize((32, 32), Image.Resampling.BICUBIC).save(path, quality=95)


@dataclass(frozen=True, slots=True)
class CacheJob:
    """A frozen dataset of digits, one of them damaged, and the command that caches its features, or another one."""

    workspace: str
    num_images: int
    settings: tuple[str, ...]
    verb: str = "cache"

    def changed(self, *settings: str) -> CacheJob:
        """The same job with other settings."""
        return replace(self, settings=(*self.settings, *settings))

    def copied_to(self, folder: Path) -> CacheJob:
        """The same job on a copy of its workspace; the images stay where they are."""
        return replace(self, workspace=str(shutil.copytree(self.workspace, folder / "workspace")))

    def start(self, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run the command in a process of its own, whatever its end."""
        return convoy(*self.arguments(), "--json", environment=environment)

    def start_here(self) -> subprocess.CompletedProcess[str]:
        """Run the command in this process, whatever its end."""
        return convoy_here(*self.arguments(), "--json")

    def run(self, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Run the command in a process of its own; it must succeed."""
        return convoy_json(*self.arguments(), environment=environment)

    def run_here(self) -> dict[str, Any]:
        """Run the command in this process, on the Ray that is open in it; it must succeed."""
        return convoy_json_here(*self.arguments())

    def verify(self, run: str | None = None) -> dict[str, Any]:
        """The proof of a run, or of the job's only one."""
        if run is None:
            (folder,) = self._runs()
            run = folder.name
        return convoy_json_here("verify", run, "--workspace", self.workspace)

    def attempts(self) -> dict[str, list[str]]:
        """The finished attempts of each slice, by its name."""
        found: dict[str, list[str]] = defaultdict(list)
        for run in self._runs():
            for record in sorted((run / "records").glob("*.json")):
                name, _, attempt = record.stem.rpartition("-")
                assert parse_slice_name(name)
                found[name].append(attempt)
        return dict(found)

    def _runs(self) -> list[Path]:
        return [path for path in Path(self.workspace, "runs").glob("*") if path.name != "open"]

    def arguments(self) -> list[str]:
        """The command line behind `convoy`."""
        return [self.verb, "--workspace", self.workspace, *settings_arguments(*self.settings)]


def cached_features(workspace: str, set_id: str) -> dict[str, np.ndarray]:
    """The committed features_D of a set by sample id; every sample has one row."""
    tables = list(FeatureCache(open_store(workspace)).iter_parts(set_id, ["sample_id", "features"]))
    ids = [name for table in tables for name in table["sample_id"].to_pylist()]
    assert len(set(ids)) == len(ids)
    features_ND = np.concatenate([features_array(table["features"]) for table in tables])
    return dict(zip(ids, features_ND, strict=True))


def made_job(folder: Path, *, num_images: int = 96) -> CacheJob:
    """96 digits in 6 slices, with two taps, so that a slice has two parts, and one reject."""
    write_digits(folder / "images", num_images - 1)
    (folder / "images" / "0" / "damaged.jpg").write_bytes(b"\xff\xd8\xff\xe0 not much of an image")
    workspace = str(folder / "workspace")
    assert freeze(folder / "images", workspace)["samples"] == num_images
    settings = (
        "dataset=digits",
        f"backbone={LENET}",
        "taps=[c3, f6]",
        "extraction={batch_size: 16, slice_rows: 16, precision: fp32}",
    )
    return CacheJob(workspace, num_images, settings)
