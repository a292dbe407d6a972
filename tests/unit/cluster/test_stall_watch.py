from __future__ import annotations

import subprocess
import sys

import pytest

# A C function that holds Python's lock until it ends, as a decoder may that hangs.
HOLDING_THE_LOCK = "ctypes.PyDLL(None).sleep(60)"


def run(script: str) -> subprocess.CompletedProcess[str]:
    """What becomes of a process that runs the lines."""
    imports = "import ctypes, time\nfrom convoy.cluster.stall_watch import StallWatch\n"
    return subprocess.run(
        [sys.executable, "-c", imports + script], capture_output=True, text=True, timeout=50, check=False
    )


@pytest.mark.parametrize("hangs", ["time.sleep(60)", HOLDING_THE_LOCK])
def test_a_process_in_which_nothing_moves_ends_and_says_where_it_was(hangs: str) -> None:
    ended = run(f"""
def read():
    {hangs}
with StallWatch(0.5).watching():
    read()
""")
    assert ended.returncode == 1
    assert "Timeout (0:00:00.500000)!" in ended.stderr
    assert " in read\n" in ended.stderr


def test_a_process_in_which_something_moves_does_not_end() -> None:
    ended = run("""
watch = StallWatch(4)
with watch.watching():
    for _ in range(10):
        time.sleep(0.5)
        watch.moved()
""")
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize(
    "lines",
    [
        "with watch.watching(): pass",
        "watch.begin(); watch.rest()",
        "watch.moved()",
        "with watch.watching(): watch.rest(); time.sleep(1)",
    ],
)
def test_nothing_has_to_move_where_nothing_is_waited_for(lines: str) -> None:
    ended = run(f"watch = StallWatch(0.5)\n{lines}\ntime.sleep(1)")
    assert (ended.returncode, ended.stderr) == (0, "")


def test_it_counts_again_after_a_rest() -> None:
    ended = run("watch = StallWatch(0.5)\nwatch.begin()\nwatch.rest()\nwatch.begin()\ntime.sleep(60)")
    assert ended.returncode == 1


def test_batches_may_take_long_where_the_first_one_did() -> None:
    ended = run("""
watch = StallWatch(0.1)
with watch.timing_first_batch():
    time.sleep(1)
with watch.watching():
    time.sleep(2)
""")
    assert (ended.returncode, ended.stderr) == (0, "")
