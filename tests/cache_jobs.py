"""A small real cache job, run as a person runs it: by the command line, in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from convoy.storage.runs import parse_slice_name

CONVOY = Path(sys.executable).parent / "convoy"
TIMEOUT_S = 300


def convoy(*arguments: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """One command line, to its end."""
    return subprocess.run(
        [str(CONVOY), *arguments],
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def convoy_json(*arguments: str, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The JSON of a command that must succeed."""
    finished = convoy(*arguments, "--json", environment=environment)
    assert finished.returncode == 0, finished.stderr
    report: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return report


def write_digits(folder: Path, num_images: int) -> None:
    """Real handwritten digits as JPEG class folders."""
    digits = load_digits()
    for index in range(num_images):
        path = folder / str(digits.target[index]) / f"{index:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        grey = Image.fromarray((digits.images[index] * 15).astype(np.uint8))
        grey.resize((32, 32), Image.Resampling.BICUBIC).save(path, quality=95)


@dataclass(frozen=True, slots=True)
class CacheJob:
    """A frozen dataset of digits, one of them damaged, and the command that caches its features."""

    workspace: str
    num_images: int
    settings: tuple[str, ...]

    def start(self, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run the command, whatever its end."""
        return convoy(*self.arguments(), "--json", environment=environment)

    def run(self, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Run the command, which must succeed."""
        return convoy_json(*self.arguments(), environment=environment)

    def verify(self) -> dict[str, Any]:
        """The proof of the job's only run."""
        (run,) = self._runs()
        return convoy_json("verify", run.name, "--workspace", self.workspace)

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
        overrides = [argument for setting in self.settings for argument in ("--set", setting)]
        return ["cache", "--workspace", self.workspace, *overrides]


def made_job(folder: Path, *, num_images: int = 96) -> CacheJob:
    """96 digits in 6 slices, with two taps, so that a slice has two parts, and one reject."""
    write_digits(folder / "images", num_images - 1)
    (folder / "images" / "0" / "damaged.jpg").write_bytes(b"\xff\xd8\xff\xe0 not much of an image")
    workspace = str(folder / "workspace")
    dataset = ("dataset", str(folder / "images"), "--name", "digits", "--workspace", workspace)
    assert convoy_json(*dataset)["samples"] == num_images
    settings = (
        "dataset=digits",
        "backbone={arch: lenet5, weights: random, preset: {resize_px: null, crop_px: 32}}",
        "taps=[c3, f6]",
        "extraction={batch_size: 16, slice_rows: 16, precision: fp32}",
    )
    return CacheJob(workspace, num_images, settings)
