"""A driver that hangs for longer than its lease is replaced; when it wakes, it is told, and harms nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from cache_jobs import made_job
from chaos_jobs import FaultTable, audit_run
from command_lines import CONVOY, TIMEOUT_S
from convoy.pipelines.runs_list import list_runs
from convoy.storage.leases import read_lease
from convoy.storage.runs import RunFolder
from convoy.storage.stores import open_store
from hanging_images import HangingImage, wait_until

pytestmark = [pytest.mark.integration, pytest.mark.chaos, pytest.mark.slow]


def test_paused_driver_is_replaced_and_stops_when_it_wakes(tmp_path: Path, fault_table: FaultTable) -> None:
    clean = made_job(tmp_path / "clean")
    clean.run()
    job = made_job(tmp_path)
    store = open_store(job.workspace)
    image = HangingImage(max((tmp_path / "images").rglob("*.jpg"), key=str))
    command = [str(CONVOY), *job.arguments(), "--json"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as paused:
        try:
            wait_until(lambda: any(run.done == 80 for run in list_runs(store).runs))
            # Nothing shows when a worker opens a pipe that nobody writes to, so it is given ample time.
            time.sleep(10)
            os.kill(paused.pid, signal.SIGSTOP)
            image.restore()

            report = job.run()
            assert (report["recomputed"], report["rows"]) == (16, job.num_images - 1)
            lease = read_lease(RunFolder(store, report["run"]))
            assert lease is not None
            assert lease.token == 2

            os.kill(paused.pid, signal.SIGCONT)
            image.release()
            assert paused.stderr is not None
            said = paused.stderr.read()
            assert paused.wait(TIMEOUT_S) == 1, said
        finally:
            paused.kill()
    assert "could not renew its lease in time" in said
    proof = job.verify()
    assert proof["ok"], proof["problems"]
    # What its worker wrote after the run was published is gone again.
    fault_table.add(
        "F11 driver paused beyond its lease, cache",
        fired=1,
        audit=audit_run(job.workspace, report["run"]),
        clean_digest=clean.verify()["rows_digest"],
    )
