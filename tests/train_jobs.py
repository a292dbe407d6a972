"""Small real trainings of networks by the command line, and what they leave in their run folders."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import boto3

from cache_jobs import freeze, write_digits
from checkpoint_records import checkpoint_records
from command_lines import CONVOY, convoy, convoy_here, report_of, settings_arguments
from convoy.storage.checkpoints import CheckpointRecord
from convoy.storage.documents import exists
from convoy.storage.runs import RunFolder, run_ids
from convoy.storage.stores import open_store

PRESET = "{resize_px: 32, crop_px: 32}"
LENET = f"{{arch: lenet5, weights: random, preset: {PRESET}}}"
# 33 validation rows, so that two workers have uneven shares.
NUM_ROWS = {"train": 96, "val": 33, "test": 60}
_SECONDS_OF_AN_EPOCH = ("seconds", "wait_s", "images_per_s")


def write_splits(folder: Path) -> None:
    """Real handwritten digits as JPEG files in the folders train, val and test."""
    start = 0
    for split, num_rows in NUM_ROWS.items():
        write_digits(folder / split, num_rows, start=start)
        start += num_rows


def put_images(folder: Path, bucket: str) -> list[str]:
    """Upload the files of a folder below `images/`; their keys."""
    client = boto3.session.Session().client("s3")
    keys = []
    for path in sorted(folder.rglob("*.jpg")):
        keys.append(f"images/{path.relative_to(folder)}")
        client.put_object(Bucket=bucket, Key=keys[-1], Body=path.read_bytes())
    return keys


def frozen_digits(folder: Path) -> str:
    """A workspace that has these digits as the dataset `digits`."""
    write_splits(folder / "images")
    workspace = str(folder / "workspace")
    assert freeze(folder / "images", workspace)["splits"] == NUM_ROWS
    return workspace


def timeless(history: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What of a history does not depend on how fast the machine is."""
    return [
        {name: value for name, value in one.items() if name not in _SECONDS_OF_AN_EPOCH} for one in history
    ]


@dataclass(frozen=True, slots=True)
class TrainJob:
    """A `convoy train` command, and the environment of the processes that run it."""

    workspace: str
    settings: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)

    def changed(self, *settings: str) -> TrainJob:
        """The same job with other settings."""
        return replace(self, settings=(*self.settings, *settings))

    def arguments(self) -> list[str]:
        """The command line behind `convoy`."""
        settings = settings_arguments("dataset=digits", *self.settings)
        return ["train", "--workspace", self.workspace, *settings, "--json"]

    def start(self) -> subprocess.CompletedProcess[str]:
        """Run the command in a process of its own, whatever its end."""
        return convoy(*self.arguments(), environment=self.environment)

    def start_here(self) -> subprocess.CompletedProcess[str]:
        """Run the command in this process, whatever its end."""
        return convoy_here(*self.arguments())

    def run(self) -> dict[str, Any]:
        """Run the command in a process of its own; it must succeed."""
        return report_of(self.start())

    def run_here(self) -> dict[str, Any]:
        """Run the command in this process; it must succeed."""
        return report_of(self.start_here())

    def command(self) -> list[str]:
        """The whole command line."""
        return [str(CONVOY), *self.arguments()]

    def checkpoints(self) -> list[CheckpointRecord]:
        """The checkpoints of the workspace's only training, newest first; empty before it has begun."""
        folders = self.training_folders()
        return checkpoint_records(open_store(self.workspace), folders[0].run_id) if folders else []

    def training_folders(self) -> list[RunFolder]:
        """The run folders of the workspace that hold trainings."""
        store = open_store(self.workspace)
        folders = [RunFolder(store, run_id) for run_id in run_ids(store)]
        return [folder for folder in folders if exists(store, folder.key("initial.safetensors"))]
