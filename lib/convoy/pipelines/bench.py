"""`convoy bench`: run a benchmark of the source checkout and report its ratios."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import RootModel

from convoy.core.errors import ConfigError, ConvoyError

_FOLDER = Path(__file__).parents[3] / "tests" / "benchmarks"


BENCHMARKS = (
    "advise",
    "cache",
    "evaluate",
    "layout",
    "near_duplicates",
    "plan",
    "report",
    "resume",
    "score",
    "strategies",
    "train",
)


class BenchReport(RootModel[dict[str, Any]]):
    """What the benchmark measured: ratios first, then every raw rate."""


def run_bench(job: str, settings: Sequence[str]) -> BenchReport:
    """Run `tests/benchmarks/<job>.py` in a process of its own; its last line on stdout is the report.

    Benchmarks bring the usual ways of other libraries along, so they are part of the checkout, not of the package.
    """
    script = _FOLDER / f"{job}.py"
    if job not in BENCHMARKS or not script.is_file():
        known = [name for name in BENCHMARKS if (_FOLDER / f"{name}.py").is_file()]
        raise ConfigError(
            f"there is no benchmark '{job}'",
            where=str(_FOLDER),
            next_step=f"choose one of: {', '.join(known)}" if known else "run it from a checkout of Convoy",
        )
    finished = subprocess.run(
        [sys.executable, str(script), *settings], stdout=subprocess.PIPE, text=True, check=False
    )
    if finished.returncode:
        raise ConvoyError(f"the benchmark ended with exit code {finished.returncode}", where=str(script))
    return BenchReport(json.loads(finished.stdout.splitlines()[-1]))
