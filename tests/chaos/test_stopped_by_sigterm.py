"""A spot notice or a scheduler's stop: SIGTERM ends the job in order, and the same command goes on."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

from cache_jobs import made_job
from chaos_jobs import FaultTable, audit_run, wait_for
from command_lines import CONVOY

pytestmark = [pytest.mark.integration, pytest.mark.chaos]

NUM_IMAGES = 480
NUM_SLICES = NUM_IMAGES // 16
# What a spot machine has between its notice and its end.
NOTICE_S = 120


def test_a_stopped_job_exits_with_4_within_the_notice_and_goes_on_from_its_finished_slices(
    tmp_path: Path, ray_cluster: dict[str, str], fault_table: FaultTable
) -> None:
    job = made_job(tmp_path, num_images=NUM_IMAGES)
    clean = job.copied_to(tmp_path / "clean")
    command = [str(CONVOY), *job.arguments()]
    # On a Ray of its own, as it does not know of this process'; what comes then is quicker here.
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        try:
            wait_for(lambda: len(job.attempts()) >= 2, process)
            process.send_signal(signal.SIGTERM)
            _, stderr = process.communicate(timeout=NOTICE_S)
        finally:
            process.kill()
    assert process.returncode == 4, stderr
    assert stderr.splitlines()[-1] == "stopped: run the same command again to go on"
    assert "Traceback" not in stderr
    before = job.attempts()
    assert 2 <= len(before) < NUM_SLICES, "the job ended before the fault"

    report = job.run_here()
    assert (report["rows"], report["rejects"]) == (NUM_IMAGES - 1, 1)
    assert job.verify()["ok"]
    after = job.attempts()
    assert {name: after[name] for name in before} == before
    fault_table.add(
        "F7 SIGTERM, cache",
        fired=1,
        audit=audit_run(job.workspace, report["run"]),
        clean_digest=audit_run(clean.workspace, clean.run_here()["run"]).digest,
    )
