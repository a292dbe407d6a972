"""A process of pytest-xdist that dies costs no other test, and is no failure unless it dies again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "run_pytest.py"
DYING = """
import os
from pathlib import Path

def test_before(): Path("before").open("a").write("x")

def test_that_dies():
    trials = Path("trials")
    trials.open("a").write("x")
    if len(trials.read_text()) <= {times}:
        os._exit(1)

def test_after(): Path("after").open("a").write("x")
"""


def run(folder: Path, *, times: int, other: str) -> subprocess.CompletedProcess[str]:
    """Two files in two processes: one with a test that ends its process so many times, and one with another test."""
    (folder / "test_dying.py").write_text(DYING.format(times=times), encoding="utf-8")
    (folder / "test_other.py").write_text(f"def test_other(): {other}\n", encoding="utf-8")
    options = ("-n", "2", "--dist", "loadfile", "--max-worker-restart", "0", "-p", "no:cacheprovider")
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "CONVOY_"))
    }
    return subprocess.run(
        [sys.executable, str(SCRIPT), "test_dying.py", "test_other.py", *options],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_what_a_process_that_died_leaves_runs_once_more(tmp_path: Path) -> None:
    ended = run(tmp_path, times=1, other="pass")
    assert ended.returncode == 0, ended.stdout
    assert "a process died in test_dying.py::test_that_dies: once more 2 tests" in ended.stdout
    assert "2 passed" in ended.stdout, "the others have ended"
    assert (tmp_path / "before").read_text() == "x"
    assert (tmp_path / "after").read_text() == "x"


@pytest.mark.parametrize(
    ("times", "other"), [(2, "pass"), (1, "assert False"), (1, "pass\n\nimport nothing_of_that_name")]
)
def test_a_process_that_dies_again_or_beside_a_failure_is_one(tmp_path: Path, times: int, other: str) -> None:
    ended = run(tmp_path, times=times, other=other)
    assert ended.returncode == 1, ended.stdout
    assert not (tmp_path / "after").exists()
