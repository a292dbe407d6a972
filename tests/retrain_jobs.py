"""Days of digits that arrive in a folder, and the command that keeps a model up to date with them."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cache_jobs import LENET, write_digits
from command_lines import convoy, convoy_here, last_json, settings_arguments
from convoy.storage.registry import AliasRecord, read_aliases
from convoy.storage.stores import open_store

NAME = "digits"
# A test split that the files' names choose, and a gate that a small holdout can satisfy.
SETTINGS = (
    f"name={NAME}",
    "dataset=digits",
    f"backbone={LENET}",
    "tap=f6",
    "head={C: [0.01]}",
    "splits={val_fraction: 0.1, test_fraction: 0.25}",
    "gate={margin: 0.08, max_class_drop: 1.0, max_ece_rise: 0.2}",
    "extraction={precision: fp32, dtype: float32, batch_size: 32, num_workers: 1}",
)
# Promotes whatever is no catastrophe: for tests of what follows a promotion.
OPEN_GATE = "gate={min_gain: -1, margin: 1, max_class_drop: 1, max_ece_rise: 1, min_newest_rows: 10000}"


@dataclass(frozen=True, slots=True)
class RetrainDays:
    """A folder in which files arrive, and a workspace. `here`: jobs run in this process, on the Ray that it has."""

    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    here: bool = False

    @property
    def images(self) -> Path:
        """Where the files arrive, as class folders."""
        return self.folder / "images"

    @property
    def workspace(self) -> str:
        """The workspace of all jobs."""
        return str(self.folder / "workspace")

    def arrive(self, start: int, num_images: int) -> None:
        """Some digits come in."""
        write_digits(self.images, num_images, start=start)

    def arrive_shuffled(self, start: int, num_images: int) -> None:
        """Some digits come in, each in the folder of another digit."""
        aside = self.folder / "aside"
        write_digits(aside, num_images, start=start)
        for path in sorted(aside.rglob("*.jpg")):
            wrong = (int(path.parent.name) + 1 + np.random.default_rng(int(path.stem)).integers(9)) % 10
            target = self.images / str(wrong) / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)

    def start(
        self, date: str, *settings: str, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run the command for a date, whatever its end."""
        if self.here:
            return convoy_here(*self.arguments(date, *settings))
        return convoy(
            *self.arguments(date, *settings), environment={**self.environment, **(environment or {})}
        )

    def run(self, date: str, *settings: str, exit_code: int = 0) -> dict[str, Any]:
        """The report of a date."""
        finished = self.start(date, *settings)
        assert finished.returncode == exit_code, finished.stderr
        return last_json(finished)

    def models(self, *words: str, exit_code: int = 0) -> dict[str, Any]:
        """What `convoy models` says, in this process; of a command that fails, its words."""
        finished = convoy_here("models", *words, "--workspace", self.workspace, "--json")
        assert finished.returncode == exit_code, finished.stderr
        return {"stderr": finished.stderr} if exit_code else last_json(finished)

    def arguments(self, date: str, *settings: str) -> list[str]:
        """The command line behind `convoy`."""
        given = settings_arguments(f"source={json.dumps(str(self.images))}", *SETTINGS, *settings)
        return ["retrain", "--workspace", self.workspace, "--date", date, *given, "--json"]

    def aliases(self) -> AliasRecord:
        """The aliases as they stand; reading them checks that the history has no gap and leads to them."""
        return read_aliases(open_store(self.workspace), NAME)

    def versions(self) -> set[str]:
        """The digests of the versions that are complete."""
        folder = Path(self.workspace, "models", NAME)
        return {name for name in os.listdir(folder) if (folder / name / "digests.json").exists()}
