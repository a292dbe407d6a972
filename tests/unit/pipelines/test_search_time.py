"""What a search's budget counts."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from convoy.pipelines.search_time import SearchTimer, seconds_spent
from convoy.storage.local_store import LocalStore
from convoy.storage.runs import RunFolder


def test_the_time_of_calls_that_were_killed_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(LocalStore(str(tmp_path)), "run-1")
    assert seconds_spent(folder) == 0
    now_s = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    killed = SearchTimer(folder, token=1)
    for _ in range(200):
        now_s += 0.5
        killed.tick()
    # Killed here; the clock of the next driver's machine has another beginning.
    assert 85 <= seconds_spent(folder) <= 100
    now_s = 3.0
    resumed = SearchTimer(folder, token=2)
    now_s += 7
    resumed.tick()
    resumed.keep()
    assert 92 <= seconds_spent(folder) <= 107
