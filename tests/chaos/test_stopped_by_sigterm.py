"""A spot notice or a scheduler's stop: SIGTERM ends the job in order, and the same command goes on."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

from cache_jobs import made_job
from chaos_jobs import FaultTable, audit_run
from command_lines import CONVOY, TIMEOUT_S

pytestmark = [pytest.mark.integration, pytest.mark.chaos]


def test_stopped_job_exits_with_4_and_resumes(tmp_path: Path, fault_table: FaultTable) -> None:
    job = made_job(tmp_path)
    command = [str(CONVOY), *job.arguments()]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith("convoy: images"):
                process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 4, "".join(lines)
    assert lines[-1] == "stopped: run the same command again to go on\n"
    assert not any("Traceback" in line for line in lines)

    report = job.run()
    assert (report["rows"], report["rejects"]) == (job.num_images - 1, 1)
    assert job.verify()["ok"]
    audit = audit_run(job.workspace, report["run"])
    fault_table.add("F7 SIGTERM, cache", fired=1, audit=audit, clean_digest=None)
