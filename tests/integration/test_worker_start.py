"""Workers that die before they are ready: Ray alone would start them for ever."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from convoy.cluster.deadly_slices import ImageTrials
from convoy.cluster.slices import SliceOperator, SliceTask, WorkerPool, run_slices
from convoy.core.errors import ClusterError
from convoy.storage.commits import SliceRecord

pytestmark = pytest.mark.integration

POOL = WorkerPool(num_workers=1, num_cpus=0.5, num_gpus=0, num_threads=1)


@dataclass(frozen=True)
class DeadlyStart:
    """A spec whose worker dies the first times that it is made; each start adds a byte to a file."""

    starts: Path
    num_deaths: int
    run_id: str = "run"

    def model_dump_json(self) -> str:
        return json.dumps({"starts": str(self.starts), "num_deaths": self.num_deaths})


def make_operator(spec_json: str) -> SliceOperator:
    spec = json.loads(spec_json)
    starts = Path(spec["starts"])
    with starts.open("ab") as file:
        file.write(b".")
    if starts.stat().st_size <= spec["num_deaths"]:
        # As the kernel does where memory is short.
        os.kill(os.getpid(), signal.SIGKILL)

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
            flags={},
            seconds={},
            started_unix_s=0,
            first_row_unix_s=0,
            finished_unix_s=0,
            precision_effect={},
        )

    return operator


def test_a_worker_that_always_dies_at_its_start_ends_the_run(
    ray_cluster: dict[str, str], tmp_path: Path
) -> None:
    spec = DeadlyStart(tmp_path / "starts", num_deaths=1000)
    with pytest.raises(ClusterError, match="3 times, one after another, before it was ready") as ended:
        list(run_slices(make_operator, spec, [SliceTask(slice="000000", outputs=())], POOL, verb="score"))
    assert "memory" in ended.value.next_step
    assert spec.starts.stat().st_size == 4, "the fault did not fire as often"


def test_a_worker_that_dies_twice_at_its_start_costs_no_slice(
    ray_cluster: dict[str, str], tmp_path: Path
) -> None:
    spec = DeadlyStart(tmp_path / "starts", num_deaths=2)
    tasks = [SliceTask(slice=f"{number:06d}", outputs=()) for number in range(3)]
    records = list(run_slices(make_operator, spec, tasks, POOL, verb="score"))
    assert {record.slice for record in records} == {task.slice for task in tasks}
    assert spec.starts.stat().st_size == 3, "the fault did not fire as often"
