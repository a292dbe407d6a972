"""Processes that are killed while they move aliases: one valid version always, and a history without gaps."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from convoy.core.crash_points import CrashPoint
from convoy.storage.bundles import list_bundles, resolve_bundle, write_bundle
from convoy.storage.registry import Alias, read_aliases
from convoy.storage.stores import open_store
from crash_point_sets import RETRAIN_CRASH_POINTS
from retrain_jobs import NAME, OPEN_GATE, RetrainDays

pytestmark = pytest.mark.chaos

NUM_MOVES = 6
# Promotes each version in turn, once: a version that a former process promoted is not promoted again.
MOVER = """
import sys
from convoy.storage.registry import Alias, AliasMove, move_aliases
from convoy.storage.stores import open_store
store = open_store(sys.argv[1])
for number, digest in enumerate(sys.argv[2:]):
    def decide(record):
        if record.move_by(str(number)):
            return None
        former = record.aliases.get(Alias.CHAMPION)
        moves = {Alias.CHAMPION: digest, **({Alias.PREVIOUS: former} if former else {})}
        return AliasMove(action="promoted", moves=moves, run=str(number), reason="next")
    move_aliases(store, "net", decide)
"""


def start(workspace: Path, digests: list[str], crash: str = "") -> int:
    environment = {**os.environ, "CONVOY_CRASH_POINT": crash}
    command = [sys.executable, "-c", MOVER, str(workspace), *digests]
    return subprocess.run(command, env=environment, check=False, timeout=60).returncode


@pytest.mark.parametrize("seed", range(20))
def test_a_kill_between_two_promotions_leaves_one_valid_champion(tmp_path: Path, seed: int) -> None:
    store = open_store(str(tmp_path / "workspace"))
    described = dict.fromkeys(("config.json", "preprocess.json", "classes.json", "metrics.json"), b"{}")
    files = {**described, "README.md": b"# net\n"}
    digests = [
        write_bundle(store, "net", {**files, "model.safetensors": bytes([number])}).digest
        for number in range(NUM_MOVES)
    ]
    draw = random.Random(seed)
    point = draw.choice([CrashPoint.ALIASES_CHOSEN, CrashPoint.ALIASES_MOVED])
    arrival = draw.randint(1, NUM_MOVES)
    arrivals = tmp_path / "arrivals"

    killed = start(tmp_path / "workspace", digests, f"{point}:{arrival}:{arrivals}")
    assert killed == -signal.SIGKILL
    assert arrivals.stat().st_size == arrival

    num_moved = arrival if point is CrashPoint.ALIASES_MOVED else arrival - 1
    left = read_aliases(store, "net")
    assert left.revision == num_moved
    assert left.aliases.get(Alias.CHAMPION) == (digests[num_moved - 1] if num_moved else None)

    assert start(tmp_path / "workspace", digests) == 0
    record = read_aliases(store, "net")
    assert [entry.run for entry in record.history] == [str(number) for number in range(NUM_MOVES)]
    assert record.aliases == {Alias.CHAMPION: digests[-1], Alias.PREVIOUS: digests[-2]}
    assert resolve_bundle(store, "net@champion") in list_bundles(store)


@pytest.mark.slow
@pytest.mark.parametrize("point", sorted(RETRAIN_CRASH_POINTS))
def test_a_retraining_that_is_killed_goes_on_by_the_same_command(tmp_path: Path, point: CrashPoint) -> None:
    days = RetrainDays(tmp_path)
    days.arrive(0, 300)
    assert days.run("2026-01-01")["decision"] == "promoted"
    first = days.aliases().aliases[Alias.CHAMPION]
    days.arrive(300, 300)

    arrivals = tmp_path / "arrivals"
    killed = days.start("2026-01-02", OPEN_GATE, environment={"CONVOY_CRASH_POINT": f"{point}:1:{arrivals}"})
    assert killed.returncode == -signal.SIGKILL
    assert arrivals.stat().st_size == 1
    assert days.aliases().aliases[Alias.CHAMPION] in days.versions()

    finished = days.run("2026-01-02", OPEN_GATE)
    assert finished["decision"] == "promoted"
    assert finished["recomputed"] == 300
    record = days.aliases()
    assert [entry.run for entry in record.history] == [
        f"retrains/{NAME}/2026-01-01",
        f"retrains/{NAME}/2026-01-02",
    ]
    assert record.aliases[Alias.PREVIOUS] == first
    assert record.aliases[Alias.CHAMPION] in days.versions()
