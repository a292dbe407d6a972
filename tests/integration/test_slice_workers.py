"""Workers of slices in Ray: in which thread their operator lives, and those that die before it does."""

from __future__ import annotations

import json
import os
import signal
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

from convoy.cluster.deadly_slices import ImageTrials
from convoy.cluster.slices import SliceOperator, SliceTask, WorkerPool, run_slices
from convoy.core.errors import ClusterError
from convoy.storage.commits import SliceRecord

pytestmark = pytest.mark.integration

POOL = WorkerPool(num_workers=1, num_cpus=0.5, num_gpus=0, num_threads=1)


def done(task: SliceTask, **flags: int) -> SliceRecord:
    """The record of an operator that does nothing. Ray's workers find no helpers of the tests."""
    return SliceRecord(
        run_id="run",
        slice=task.slice,
        attempt="0",
        parts={},
        rejects=None,
        num_results=0,
        num_rejects=0,
        reject_codes={},
        flags=flags,
        seconds={},
        started_unix_s=0,
        first_row_unix_s=0,
        finished_unix_s=0,
        precision_effect={},
    )


class RunOnly:
    """As much of a spec as `run_slices` reads."""

    run_id = "run"

    def model_dump_json(self) -> str:
        return "{}"


def make_threaded(_: str) -> SliceOperator:
    made_in = threading.get_native_id()

    def operator(task: SliceTask, trials: ImageTrials | None = None) -> SliceRecord:
        return done(task, made_in=made_in, called_in=threading.get_native_id())

    return operator


def test_an_operator_is_made_and_called_in_one_thread(ray_cluster: dict[str, str]) -> None:
    """Ray makes an actor in one thread and calls it in another; what an operator computes belongs to one."""
    tasks = [SliceTask(slice=f"{number:06d}", outputs=()) for number in range(4)]
    records = list(run_slices(make_threaded, RunOnly(), tasks, POOL, verb="score"))
    assert len(records) == len(tasks)
    assert {record.flags["called_in"] for record in records} == {records[0].flags["made_in"]}


@dataclass(frozen=True)
class DeadlyStart:
    """A spec whose worker dies the first times that it is made; each start adds a byte to a file."""

    starts: Path
    num_deaths: int
    run_id: str = "run"

    def model_dump_json(self) -> str:
        return json.dumps({"starts": str(self.starts), "num_deaths": self.num_deaths})


def make_deadly(spec_json: str) -> SliceOperator:
    spec = json.loads(spec_json)
    starts = Path(spec["starts"])
    with starts.open("ab") as file:
        file.write(b".")
    if starts.stat().st_size <= spec["num_deaths"]:
        # As the kernel does where memory is short.
        os.kill(os.getpid(), signal.SIGKILL)

    def operator(task: SliceTask, trials: ImageTrials | None = None) -> SliceRecord:
        return done(task)

    return operator


def test_a_worker_that_always_dies_at_its_start_ends_the_run(
    ray_cluster: dict[str, str], tmp_path: Path
) -> None:
    spec = DeadlyStart(tmp_path / "starts", num_deaths=1000)
    with pytest.raises(ClusterError, match="3 times, one after another, before it was ready") as ended:
        list(run_slices(make_deadly, spec, [SliceTask(slice="000000", outputs=())], POOL, verb="score"))
    assert "memory" in ended.value.next_step
    assert spec.starts.stat().st_size == 4, "the fault did not fire as often"


def test_a_worker_that_dies_twice_at_its_start_costs_no_slice(
    ray_cluster: dict[str, str], tmp_path: Path
) -> None:
    spec = DeadlyStart(tmp_path / "starts", num_deaths=2)
    tasks = [SliceTask(slice=f"{number:06d}", outputs=()) for number in range(3)]
    records = list(run_slices(make_deadly, spec, tasks, POOL, verb="score"))
    assert {record.slice for record in records} == {task.slice for task in tasks}
    assert spec.starts.stat().st_size == 3, "the fault did not fire as often"
