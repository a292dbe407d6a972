from __future__ import annotations

import subprocess
import sys
import threading
from functools import partial
from itertools import count
from types import SimpleNamespace

import pytest

from convoy.cluster import head_watch
from convoy.cluster.head_watch import HeadWatch

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


def test_a_head_that_answers_is_not_gone() -> None:
    ended = run("""
with watching_head(f"127.0.0.1:{port}"):
    time.sleep(7)
""")
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize(("answers", "is_gone"), [("..x..x.", False), (".x...x", True)])
def test_gone_is_a_head_that_does_not_answer_for_the_whole_time(
    monkeypatch: pytest.MonkeyPatch, answers: str, is_gone: bool
) -> None:
    """Looks that are 5 s apart, of which x have an answer; three in a row without one are 15 s."""
    is_over, looks, stopped = threading.Event(), iter(answers), []
    monkeypatch.setattr(head_watch, "_BETWEEN_LOOKS_S", 0)
    monkeypatch.setattr(head_watch, "time", SimpleNamespace(monotonic=partial(next, count(0, 5))))

    def is_answered(_: HeadWatch) -> bool:
        look = next(looks, None)
        if look is None:
            is_over.set()
        return look != "."

    monkeypatch.setattr(HeadWatch, "_is_answered", is_answered)
    monkeypatch.setattr(HeadWatch, "_stop_process", lambda *_: stopped.append(True))
    HeadWatch("127.0.0.1:6379", gone_after_s=15, stopping_s=1).run(is_over)
    assert bool(stopped) is is_gone


def test_nothing_is_watched_when_the_session_is_over() -> None:
    ended = run("""
with watching_head(f"127.0.0.1:{port}"):
    pass
head.close()
time.sleep(7)
""")
    assert (ended.returncode, ended.stderr) == (0, "")
