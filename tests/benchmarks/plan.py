"""`convoy bench plan`: what planning a run costs the driver as the manifest grows: seconds, and memory at its peak.

    python tests/benchmarks/plan.py [key=value ...]

Progress goes to stderr; the last line on stdout is the report as JSON. The keys are the fields of `PlanBench`.
It needs Linux, which accounts for the memory of a process in /proc.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from enum import StrEnum
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from machine import describe_machine, machine_facts
from measuring import BenchSettings, run_benchmark, say
from plan_steps import (
    Measured,
    StepCost,
    plan_missing_features,
    plan_new_features,
    plan_scoring,
    resume_scoring,
)
from plan_workspace import EVERY_MISSING, commit_features, describe_stored, make_manifest, record_half
from pydantic import Field

# From here on a slope is taken: below, fixed costs hide what a row costs.
SLOPE_FROM_ROWS = 10_000

# The steps of a case by their names.
Steps = dict[str, StepCost]
ResultT = TypeVar("ResultT")


class Job(StrEnum):
    """Whose planning is measured."""

    SCORE = "score"
    CACHE = "cache"


class Case(StrEnum):
    """A new scoring, one that goes on with half of its slices; features where none are cached, or most."""

    SCORE = "score"
    RESUME = "resume"
    NEW = "new"
    GROWN = "grown"


_CASES = {Job.SCORE: (Case.SCORE, Case.RESUME), Job.CACHE: (Case.NEW, Case.GROWN)}
_PLAN: dict[Case, Callable[[str, str], Measured]] = {
    Case.SCORE: plan_scoring,
    Case.RESUME: resume_scoring,
    Case.NEW: plan_new_features,
    Case.GROWN: plan_missing_features,
}
_TITLES = {
    Case.SCORE: "`convoy score` of a dataset, from its name to the tasks for Ray",
    Case.RESUME: "the same command again, when half of the slices are done",
    Case.NEW: "`convoy cache` where nothing is cached, from the dataset's name to a frozen input",
    Case.GROWN: f"the same where all but one of {EVERY_MISSING} rows are cached",
}


class PlanBench(BenchSettings):
    """What is measured: manifests of 10^4, 10^5, ... samples, and of `rows`; each `repeats` times, in turn.

    `jobs` are those whose planning is measured; `results` is a Markdown file to write.
    """

    rows: int = Field(default=1_000_000, gt=SLOPE_FROM_ROWS)
    repeats: int = Field(default=3, gt=0)
    seed: int = Field(default=0, ge=0)
    jobs: tuple[Job, ...] = (Job.SCORE,)

    @property
    def sizes(self) -> list[int]:
        """The numbers of samples, from small to large."""
        first_exponent = len(str(SLOPE_FROM_ROWS)) - 1
        powers = (10**exponent for exponent in range(first_exponent, len(str(self.rows))))
        return [*(size for size in powers if size < self.rows), self.rows]

    @property
    def cases(self) -> list[Case]:
        """The cases of the jobs."""
        return [case for job in self.jobs for case in _CASES[job]]


def run_plan_bench(settings: PlanBench) -> dict[str, Any]:
    """Time and memory at the largest size, and what a row adds; then the steps for every size, as medians."""
    machine = machine_facts()
    cases: dict[Case, dict[int, Steps]] = {case: {} for case in settings.cases}
    stored = []
    for size in settings.sizes:
        say(f"{size} rows")
        by_case, on_disk = _measure_size(size, settings)
        for case, steps in by_case.items():
            cases[case][size] = steps
        stored.append({"rows": size, **on_disk})
    rows = {case: [_row(*item) for item in by_size.items()] for case, by_size in cases.items()}
    return {
        **dict(_headlines(rows)),
        **{
            f"{case}_bytes_per_row": _bytes_per_row(by_case[0], by_case[-1]) for case, by_case in rows.items()
        },
        "cases": rows,
        "slopes": {case: [_slope(*pair) for pair in pairwise(by_case)] for case, by_case in rows.items()},
        "stored": stored if Job.SCORE in settings.jobs else [],
        "machine": machine,
        "settings": settings.model_dump(mode="json"),
    }


def _measure_size(num_rows: int, settings: PlanBench) -> tuple[dict[Case, Steps], dict[str, Any]]:
    """The medians of the steps of each case, and what a run of half of the slices has on disk."""
    runs: dict[Case, list[Steps]] = {case: [] for case in settings.cases}
    on_disk: dict[str, Any] = {}
    with TemporaryDirectory(prefix="convoy-bench-plan-") as root:
        _in_fresh_process(make_manifest, root, num_rows, settings.seed)
        if Case.GROWN in runs:
            _in_fresh_process(commit_features, root)
        for repeat in range(settings.repeats):
            for case, costs in runs.items():
                # All repeats go on with the run that the first one planned.
                target = f"{Case.SCORE}-0" if case is Case.RESUME else f"{case}-{repeat}"
                measured = _in_fresh_process(_PLAN[case], root, target)
                costs.append(measured.costs)
                say(f"  {case}: {measured.costs!r}")
                if case is Case.SCORE and not on_disk:
                    _in_fresh_process(record_half, root, measured.run_id)
                    on_disk = describe_stored(root, measured.run_id)
    return {case: _medians(costs) for case, costs in runs.items()}, on_disk


def _in_fresh_process(function: Callable[..., ResultT], *arguments: Any) -> ResultT:
    """What the function returns in a process that has done nothing but imports."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _medians(runs: Sequence[Steps]) -> Steps:
    return {
        step: StepCost(
            **{
                name: statistics.median(getattr(run[step], name) for run in runs)
                for name in StepCost.model_fields
            }
        )
        for step in runs[0]
    }


def _headlines(rows: dict[Case, list[dict[str, Any]]]) -> Iterator[tuple[str, float]]:
    """Seconds and memory of a scoring at the largest size."""
    for case, prefix in ((Case.SCORE, ""), (Case.RESUME, "resume_")):
        if case in rows:
            yield f"{prefix}seconds", rows[case][-1]["seconds"]
            yield f"{prefix}peak_rss_mib", rows[case][-1]["peak_rss_mib"]


def _row(num_rows: int, steps: Steps) -> dict[str, Any]:
    seconds = sum(cost.seconds for cost in steps.values())
    return {
        "rows": num_rows,
        "seconds": seconds,
        "rows_per_s": num_rows / seconds,
        "peak_mib": max(cost.peak_mib for cost in steps.values()),
        "peak_rss_mib": max(cost.rss_mib for cost in steps.values()),
        "steps": {name: cost.model_dump() for name, cost in steps.items()},
    }


def _slope(small: dict[str, Any], large: dict[str, Any]) -> dict[str, float]:
    """What a row adds from one size to the next."""
    num_rows = large["rows"] - small["rows"]
    return {
        "from_rows": small["rows"],
        "to_rows": large["rows"],
        "us_per_row": (large["seconds"] - small["seconds"]) * 1e6 / num_rows,
        "bytes_per_row": _bytes_per_row(small, large),
    }


def _bytes_per_row(small: dict[str, Any], large: dict[str, Any]) -> float:
    return float((large["peak_mib"] - small["peak_mib"]) * 2**20 / (large["rows"] - small["rows"]))


def write_page(path: Path, report: dict[str, Any]) -> None:
    """Write the report as Markdown."""
    path.write_text("\n".join(_page(report)) + "\n", encoding="utf-8")


def _page(report: dict[str, Any]) -> Iterator[str]:
    yield "# `convoy bench plan`"
    yield ""
    yield (
        "Planning a run in a fresh process. Each step: wall seconds / CPU seconds / peak MiB over the process after "
        f"its imports; `peak RSS` is the whole process. Medians of {report['settings']['repeats']} repeats."
    )
    yield ""
    yield from describe_machine(report["machine"])
    for case, rows in report["cases"].items():
        yield from ("", f"## {case}: {_TITLES[Case(case)]}", "")
        yield from _steps_table(rows)
        yield ""
        yield from _plain_table(report["slopes"][case])
    if report["stored"]:
        yield from ("", "## On disk, with half of the slices recorded", "")
        yield from _plain_table(report["stored"])


def _steps_table(rows: list[dict[str, Any]]) -> Iterator[str]:
    steps = rows[0]["steps"]
    yield f"| rows | {' | '.join(steps)} | seconds | rows/s | peak MiB | peak RSS MiB |"
    yield f"| ---: |{' ---: |' * (len(steps) + 4)}"
    for row in rows:
        cells = [
            f"{cost['seconds']:.3f} / {cost['cpu_s']:.3f} / {cost['peak_mib']:.0f}"
            for cost in row["steps"].values()
        ]
        totals = f"{row['seconds']:.1f} | {row['rows_per_s']:.0f} | {row['peak_mib']:.0f} | {row['peak_rss_mib']:.0f}"
        yield f"| {row['rows']} | {' | '.join(cells)} | {totals} |"


def _plain_table(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield f"| {' | '.join(name.replace('_', ' ') for name in rows[0])} |"
    yield f"|{' ---: |' * len(rows[0])}"
    for row in rows:
        yield f"| {' | '.join(f'{value:.2f}' if isinstance(value, float) else str(value) for value in row.values())} |"


if __name__ == "__main__":
    run_benchmark(PlanBench, run_plan_bench, write_page)
