"""The disk of the workspace is full in the middle of a run: the job stops, and goes on once there is room."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cache_jobs import made_job
from chaos_jobs import Audit, FaultTable
from train_jobs import frozen_digits
from tune_jobs import NETWORK, SETTINGS

pytestmark = [pytest.mark.integration, pytest.mark.chaos, pytest.mark.slow]

NUM_IMAGES = 480
DISK_BYTES = 16 << 20
# Of what the job writes: room for what comes before the slices, and for some of them.
ROOM_SHARE = 0.6
IN_NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]

# Runs where the disk is mounted, which nobody else sees.
SCRIPT = f"""
import json, os, shutil, sys
from dataclasses import asdict
from pathlib import Path
from cache_jobs import CacheJob
from chaos_jobs import audit_run
from convoy.storage.runs import run_ids
from convoy.storage.stores import open_store

made, disk, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
def free_bytes():
    status = os.statvfs(disk)
    return status.f_bavail * status.f_frsize

def new_job(name):
    return CacheJob(str(shutil.copytree(made, f"{{disk}}/{{name}}")), {NUM_IMAGES}, tuple(settings))

clean = new_job("clean")
free_before = free_bytes()
clean.run()
room_bytes = int({ROOM_SHARE} * (free_before - free_bytes()))
shutil.rmtree(clean.workspace)
job = new_job("workspace")
ballast = Path(disk, "ballast")
ballast.write_bytes(bytes(free_bytes() - room_bytes))
stopped = job.start()
before = job.attempts()
ballast.unlink()
again = job.start()
(run,) = run_ids(open_store(job.workspace))
print(json.dumps({{
    "stopped": [stopped.returncode, stopped.stderr],
    "again": [again.returncode, again.stderr],
    "before": before,
    "after": job.attempts(),
    "audit": asdict(audit_run(job.workspace, run)),
}}))
"""


SEARCH_DISK_BYTES = 16 << 20
# Room for the network and for what a training begins with, and not for its first checkpoint.
SEARCH_ROOM_BYTES = 700 << 10
SEARCH = (
    *SETTINGS,
    "name=search",
    "max_concurrent=1",
    "base.workers={cpus_per_worker: 1, max_failures: 0}",
    f"space.config={{grid: [{NETWORK}]}}",
    "space.recipe.seed={grid: [0, 1]}",
)

SEARCH_SCRIPT = f"""
import json, os, shutil, sys
from pathlib import Path
from tune_jobs import TuneJob

made, disk, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
job = TuneJob(str(shutil.copytree(made, f"{{disk}}/workspace")), tuple(settings))
status = os.statvfs(disk)
ballast = Path(disk, "ballast")
ballast.write_bytes(bytes(max(status.f_bavail * status.f_frsize - {SEARCH_ROOM_BYTES}, 0)))
stopped = job.start({{}})
before = job.records()
ballast.unlink()
again = job.start({{}})
print(json.dumps({{
    "stopped": [stopped.returncode, stopped.stderr],
    "again": [again.returncode, again.stderr],
    "before": before,
    "after": job.records(),
}}))
"""


def on_small_disk(script: str, disk: Path, size_bytes: int, workspace: str, settings: Sequence[str]) -> Any:
    """What a script prints as JSON that runs where a small disk is mounted, with a workspace to copy there."""
    disk.mkdir()
    mount = f"mount -t tmpfs -o size={size_bytes} none '{disk}'"
    if not shutil.which("unshare") or subprocess.run([*IN_NAMESPACE, mount], check=False).returncode:
        pytest.skip("this machine does not let a test mount a small disk of its own")
    arguments = [sys.executable, script, workspace, str(disk), json.dumps(settings)]
    run = subprocess.run(
        [*IN_NAMESPACE, f'{mount} && exec "$0" -c "$@"', *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_a_full_disk_stops_the_job_and_room_lets_it_go_on(tmp_path: Path, fault_table: FaultTable) -> None:
    job = made_job(tmp_path, num_images=NUM_IMAGES)
    told = on_small_disk(SCRIPT, tmp_path / "disk", DISK_BYTES, job.workspace, job.settings)
    assert told["stopped"][0] == 4, told["stopped"][1]
    assert "the disk is full" in told["stopped"][1]
    assert told["again"][0] == 0, told["again"][1]
    assert told["before"], "no slice was finished before the disk was full"
    assert {name: told["after"][name] for name in told["before"]} == told["before"]
    job.run()
    fault_table.add(
        "F25 disk full, cache",
        fired=1,
        audit=Audit(**told["audit"]),
        clean_digest=job.verify()["rows_digest"],
    )


def test_a_full_disk_is_no_fault_of_a_searchs_trials(tmp_path: Path) -> None:
    workspace = frozen_digits(tmp_path)
    told = on_small_disk(SEARCH_SCRIPT, tmp_path / "disk", SEARCH_DISK_BYTES, workspace, SEARCH)
    assert told["stopped"][0] == 4, told["stopped"][1]
    assert "the disk is full" in told["stopped"][1]
    assert told["before"] == {}
    assert told["again"][0] == 0, told["again"][1]
    assert [trial["state"] for trial in told["after"].values()] == ["finished"] * 2
