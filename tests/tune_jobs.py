"""Small real searches over trainings by the command line, and what they leave in their workspace."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from command_lines import CONVOY, convoy, convoy_here, last_json, settings_arguments
from train_jobs import LENET

PROBE = "{strategy: linear_probe, tap: f6}"
EARLY = "{strategy: early_layer_probe, tap: c3}"
NETWORK = "{strategy: from_scratch, epochs: 3, learning_rate: 0.05}"
SETTINGS = (
    "dataset=digits",
    f"base.backbone={LENET}",
    "base.recipe={batch_size: 16, precision: fp32}",
    "base.extraction={precision: fp32}",
)


@dataclass(frozen=True, slots=True)
class TuneJob:
    """A `convoy tune` command on a workspace with the dataset `digits`."""

    workspace: str
    settings: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)

    def changed(self, *settings: str) -> TuneJob:
        """The same job with other settings."""
        return replace(self, settings=(*self.settings, *settings))

    def arguments(self) -> list[str]:
        """The command line behind `convoy`."""
        return ["tune", "--workspace", self.workspace, *settings_arguments(*self.settings), "--json"]

    def command(self) -> list[str]:
        """The whole command line."""
        return [str(CONVOY), *self.arguments()]

    def run_here(self) -> dict[str, Any]:
        """Run the command in this process; it must succeed."""
        finished = convoy_here(*self.arguments())
        assert finished.returncode == 0, finished.stderr
        return last_json(finished)

    def start(self, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        """Run the command in a process of its own, whatever its end."""
        return convoy(*self.arguments(), environment={**self.environment, **environment})

    def search_folder(self) -> Path:
        """The run folder of the workspace's only search."""
        (record,) = (
            path
            for path in Path(self.workspace, "runs").glob("*/run.json")
            if json.loads(path.read_text())["verb"] == "tune"
        )
        return record.parent

    def records(self) -> dict[str, dict[str, Any]]:
        """The documents of the trials that ended."""
        return {
            path.stem: json.loads(path.read_text())
            for path in sorted((self.search_folder() / "trials").glob("*.json"))
        }

    def drawn(self) -> list[str]:
        """The names of the trials that began, sorted."""
        return sorted(path.stem for path in (self.search_folder() / "drawn").glob("*.json"))


def assert_each_trial_ran_once(job: TuneJob) -> None:
    """As many trials began as ended, each with one record, and each network was trained in one run."""
    records = job.records()
    assert job.drawn() == sorted(records)
    assert [record["index"] for record in records.values()] == list(range(len(records)))
    trained = [
        json.loads(path.read_text())["config"]["name"]
        for path in Path(job.workspace, "runs").glob("*/run.json")
        if json.loads(path.read_text())["verb"] == "train"
    ]
    assert len(set(trained)) == len(trained)
