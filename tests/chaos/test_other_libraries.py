"""A node whose workers have another library than the driver computes nothing; the job goes on where they are equal."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cache_jobs import made_job
from chaos_jobs import FaultTable, audit_run
from ray_nodes import running_nodes

pytestmark = [pytest.mark.integration, pytest.mark.chaos]


def other_pillow(folder: Path) -> Path:
    """A place for libraries in which Pillow is said to be another one, as on a node of an older image."""
    metadata = folder / "pillow-9.9.9.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: pillow\nVersion: 9.9.9\n", encoding="utf-8")
    return folder


def test_workers_with_another_library_compute_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault_table: FaultTable
) -> None:
    clean = made_job(tmp_path / "clean")
    clean.run()
    job = made_job(tmp_path)
    before = os.environ.get("PYTHONPATH", "")
    with monkeypatch.context() as patch:
        patch.setenv(
            "PYTHONPATH", os.pathsep.join(filter(None, [str(other_pillow(tmp_path / "old")), before]))
        )
        with running_nodes(2) as cluster:
            refused = job.start({"RAY_ADDRESS": cluster.address, "PYTHONPATH": before})
    assert refused.returncode == 1, refused.stderr
    assert "a worker has other libraries than the driver: pillow 9.9.9 instead of" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert job.attempts() == {}
    report = job.run()
    assert report["recomputed"] == job.num_images
    fault_table.add(
        "F31 other libraries in workers, cache",
        fired=1,
        audit=audit_run(job.workspace, report["run"]),
        clean_digest=clean.verify()["rows_digest"],
    )
