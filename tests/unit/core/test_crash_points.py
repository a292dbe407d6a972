from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from convoy.core.crash_points import CrashPoint

LIBRARY = Path(__file__).parents[3] / "lib" / "convoy"
LOOP = (
    "from convoy.core.crash_points import CrashPoint, crash_point\n"
    "for _ in range(3):\n"
    "    crash_point(CrashPoint.PART_WRITTEN); crash_point(CrashPoint.RUN_CLOSED)\n"
)


def run_loop(spec: str) -> int:
    environment = {**os.environ, "CONVOY_CRASH_POINT": spec, "PYTHONPATH": str(LIBRARY.parent)}
    return subprocess.run([sys.executable, "-c", LOOP], env=environment, check=False).returncode


def test_kills_at_the_nth_arrival_and_never_again(tmp_path: Path) -> None:
    counter = tmp_path / "arrivals"
    spec = f"part_written:2:{counter}"
    assert run_loop(spec) == -signal.SIGKILL
    assert counter.stat().st_size == 2
    assert run_loop(spec) == 0


def test_does_nothing_unless_asked() -> None:
    assert run_loop("") == 0


def test_every_crash_point_is_placed_in_the_code_exactly_once() -> None:
    placed = re.findall(
        r"crash_point\(CrashPoint\.(\w+)\)",
        "".join(path.read_text(encoding="utf-8") for path in LIBRARY.rglob("*.py")),
    )
    assert sorted(placed) == sorted(point.name for point in CrashPoint)
