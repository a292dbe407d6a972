"""`convoy bench resume`: what it costs to run a scoring again that is finished, and one whose driver was killed.

    python tests/benchmarks/resume.py [key=value ...]

Progress goes to stderr; the last line on stdout is the report as JSON. The keys are the fields of `ResumeBench`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from comparison import spread
from images import make_images, repeat_images
from machine import by_device, describe_machine, machine_facts
from measuring import BenchSettings, convoy, convoy_process, run_benchmark, say
from pydantic import Field, NonNegativeInt, PositiveInt
from results import spread_table
from score_network import ScoredNetwork

from convoy.core.errors import ConvoyError
from convoy.storage.commits import read_records
from convoy.storage.object_store import ObjectStore
from convoy.storage.runs import RunFolder, run_ids
from convoy.storage.stores import open_store

_NUM_DISTINCT = 1024
_LOOK_S = 0.1


class ResumeBench(BenchSettings):
    """What is scored, and when its driver is killed: once that share of the rows is recorded."""

    network: ScoredNetwork = ScoredNetwork(arch="lenet5", resize_px=32, crop_px=32)
    num_images: PositiveInt = Field(default_factory=lambda: by_device(32768, 131072))
    batch_size: PositiveInt = 128
    killed_at: float = Field(default=0.5, gt=0, lt=1)
    repeats: PositiveInt = 3
    seed: NonNegativeInt = 0


class Scoring:
    """One workspace in which the images are a dataset, and the command that scores it."""

    def __init__(self, settings: ResumeBench, images: str, folder: Path) -> None:
        folder.mkdir()
        self.workspace = str(folder / "workspace")
        config = folder / "score.yaml"
        config.write_text(json.dumps(_config(settings)), encoding="utf-8")
        convoy("dataset", images, "--name", "images", "--workspace", self.workspace)
        self._command = ("score", "--config", str(config), "--workspace", self.workspace)

    def run(self) -> tuple[float, dict[str, Any]]:
        """Seconds of the whole command, and its report."""
        started_s = time.monotonic()
        report = convoy(*self._command)
        return time.monotonic() - started_s, report

    def kill_at(self, num_rows: int) -> tuple[float, int]:
        """Seconds until its driver was killed, as soon as so many rows were recorded, and how many were."""
        started_s = time.monotonic()
        with convoy_process(*self._command) as process:
            while (recorded := _recorded_rows(open_store(self.workspace))) < num_rows:
                if process.poll() is not None:
                    break
                time.sleep(_LOOK_S)
            if process.poll() is not None:
                raise ConvoyError("the scoring ended before it could be killed", next_step="raise num_images")
            process.kill()
        return time.monotonic() - started_s, recorded

    def digest(self, run: str) -> str:
        """The digest of all rows of a run, every one of which was read again."""
        proof = convoy("verify", run, "--workspace", self.workspace)
        if not proof["ok"]:
            raise ConvoyError(f"the run is not whole: {proof['problems']}", where=run)
        return str(proof["rows_digest"])


def run_resume_bench(settings: ResumeBench) -> dict[str, Any]:
    """The ratios of all repeats; then what each of them took."""
    machine = machine_facts()
    with TemporaryDirectory(prefix="convoy-bench-resume-") as name:
        folder = Path(name)
        made = make_images(folder / "distinct", min(settings.num_images, _NUM_DISTINCT), seed=settings.seed)
        images = repeat_images(made, folder / "images", settings.num_images)
        repeats = []
        for number in range(settings.repeats):
            say(f"repeat {number + 1} of {settings.repeats}")
            repeats.append(_repeat(settings, images.folder, folder / str(number)))
    ratios = {name: spread([one[name] for one in repeats]) for name in repeats[0] if name.endswith("ratio")}
    return {
        **{name: ratio["median"] for name, ratio in ratios.items()},
        "ratios": ratios,
        "repeats": repeats,
        "machine": machine,
        "settings": settings.model_dump(mode="json"),
    }


def _repeat(settings: ResumeBench, images: str, folder: Path) -> dict[str, Any]:
    """A scoring, the same command again, and another scoring that is killed and gone on with."""
    folder.mkdir()
    undisturbed = Scoring(settings, images, folder / "undisturbed")
    full_s, full = undisturbed.run()
    again_s, again = undisturbed.run()
    if again["recomputed"]:
        raise ConvoyError(
            f"{again['recomputed']} rows of a finished run were computed again", where=again["run"]
        )
    killed = Scoring(settings, images, folder / "killed")
    killed_s, recorded = killed.kill_at(round(settings.killed_at * settings.num_images))
    resumed_s, resumed = killed.run()
    if resumed["recomputed"] > settings.num_images - recorded:
        raise ConvoyError("rows that were recorded were computed again", where=resumed["run"])
    if killed.digest(resumed["run"]) != undisturbed.digest(full["run"]):
        raise ConvoyError("the resumed run has other rows than the undisturbed one", where=resumed["run"])
    measured = {
        # Both from the first line of the job on: what comes before is the start of a Python process.
        "finished_again_ratio": again["job_s"] / full["job_s"],
        "finished_again_wall_ratio": again_s / full_s,
        # Ray starts once more, and the slices that were under way are done again.
        "killed_wall_ratio": (killed_s + resumed_s) / full_s,
        "full_wall_s": full_s,
        "again_wall_s": again_s,
        "killed_wall_s": killed_s,
        "resumed_wall_s": resumed_s,
        "full_first_row_s": full["first_row_s"],
        "resumed_first_row_s": resumed["first_row_s"],
        "recorded_rows": recorded,
        "recomputed_rows": resumed["recomputed"],
    }
    say(f"  {measured!r}")
    return measured


def _recorded_rows(store: ObjectStore) -> int:
    """The rows of all finished slices of a workspace."""
    records = (one for run_id in run_ids(store) for one in read_records(RunFolder(store, run_id)))
    return sum(one.num_results + one.num_rejects for one in records)


def _config(settings: ResumeBench) -> dict[str, Any]:
    return {
        "dataset": "images",
        "model": settings.network.scored_model,
        "columns": {"outputs": "logits"},
        "extraction": {"batch_size": settings.batch_size},
    }


def _write_page(path: Path, report: dict[str, Any]) -> None:
    path.write_text("\n".join(_page(report)) + "\n", encoding="utf-8")


def _page(report: dict[str, Any]) -> Iterator[str]:
    settings = report["settings"]
    yield from ("# `convoy bench resume`", "")
    yield (
        f"{settings['network']['arch']} at {settings['network']['crop_px']} pixels, {settings['num_images']} JPEGs of"
        f" 500x375, {settings['repeats']} repeats; killed once {settings['killed_at']:.0%} of the rows were recorded."
    )
    yield ""
    yield from describe_machine(report["machine"])
    yield from spread_table("ratio to the undisturbed scoring", report["ratios"], digits=3)
    names = [name for name in report["repeats"][0] if not name.endswith("ratio")]
    measured = {name: spread([one[name] for one in report["repeats"]]) for name in names}
    yield from spread_table("seconds and rows", measured, digits=1)


if __name__ == "__main__":
    run_benchmark(ResumeBench, run_resume_bench, _write_page)
