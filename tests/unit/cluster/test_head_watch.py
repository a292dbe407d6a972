from __future__ import annotations

import subprocess
import sys

import pytest

# A driver whose head listens at a port of this machine, and is to answer again within 4 s.
DRIVER = """
import os, signal, socket, sys, threading, time
from convoy.cluster.head_watch import watching_head

def stop(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGTERM, stop)
os.environ["RAY_gcs_rpc_server_reconnect_timeout_s"] = "5"
head = socket.create_server(("127.0.0.1", 0))
port = head.getsockname()[1]
"""


def run(script: str) -> subprocess.CompletedProcess[str]:
    """What becomes of a driver that runs the lines."""
    return subprocess.run(
        [sys.executable, "-c", DRIVER + script], capture_output=True, text=True, timeout=60, check=False
    )


def test_a_job_whose_head_is_gone_is_stopped_in_order() -> None:
    stopped = run("""
try:
    with watching_head(f"127.0.0.1:{port}"):
        head.close()
        time.sleep(60)
except KeyboardInterrupt:
    print("in order")
""")
    assert (stopped.returncode, stopped.stdout) == (0, "in order\n")
    assert "has not answered for 4 s: run the same command again" in stopped.stderr


def test_a_job_that_waits_for_a_head_that_is_gone_exits_as_resumable() -> None:
    stopped = run("""
signal.signal(signal.SIGTERM, signal.SIG_IGN)
with watching_head(f"127.0.0.1:{port}"):
    head.close()
    time.sleep(60)
""")
    assert stopped.returncode == 4


@pytest.mark.parametrize(
    "lines",
    [
        "time.sleep(7)",
        "head.close(); time.sleep(1); head = socket.create_server(('127.0.0.1', port)); time.sleep(7)",
    ],
)
def test_a_head_that_answers_or_does_so_again_is_not_gone(lines: str) -> None:
    ended = run(f"""
with watching_head(f"127.0.0.1:{{port}}"):
    {lines}
""")
    assert (ended.returncode, ended.stderr) == (0, "")


def test_nothing_is_watched_when_the_session_is_over() -> None:
    ended = run("""
with watching_head(f"127.0.0.1:{port}"):
    pass
head.close()
time.sleep(7)
""")
    assert (ended.returncode, ended.stderr) == (0, "")
