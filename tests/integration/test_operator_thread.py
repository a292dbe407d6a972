"""Ray makes an actor in one thread and calls it in another; what an operator computes belongs to one."""

from __future__ import annotations

import threading

import pytest

from convoy.cluster.deadly_slices import ImageTrials
from convoy.cluster.slices import SliceOperator, SliceTask, WorkerPool, run_slices
from convoy.storage.commits import SliceRecord

pytestmark = pytest.mark.integration

POOL = WorkerPool(num_workers=1, num_cpus=0.5, num_gpus=0, num_threads=1)


class RunOnly:
    """As much of a spec as `run_slices` reads."""

    run_id = "run"

    def model_dump_json(self) -> str:
        return "{}"


def make_operator(_: str) -> SliceOperator:
    made_in = threading.get_native_id()

    def operator(task: SliceTask, trials: ImageTrials | None = None) -> SliceRecord:
        return SliceRecord(
            run_id="run",
            slice=task.slice,
            attempt="0",
            parts={},
            rejects=None,
            num_results=0,
            num_rejects=0,
            reject_codes={},
            flags={"made_in": made_in, "called_in": threading.get_native_id()},
            seconds={},
            started_unix_s=0,
            first_row_unix_s=0,
            finished_unix_s=0,
            precision_effect={},
        )

    return operator


def test_an_operator_is_made_and_called_in_one_thread(ray_cluster: dict[str, str]) -> None:
    tasks = [SliceTask(slice=f"{number:06d}", outputs=()) for number in range(4)]
    records = list(run_slices(make_operator, RunOnly(), tasks, POOL, verb="score"))
    assert len(records) == len(tasks)
    assert {record.flags["called_in"] for record in records} == {records[0].flags["made_in"]}
