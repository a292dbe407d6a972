"""The source changes under a job: it goes on with what was frozen, and never takes one image for another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from cache_jobs import CacheJob, freeze, made_job
from chaos_jobs import FaultTable, audit_run
from convoy.storage.stores import open_store
from made_bundles import made_classifier, write_classifier

pytestmark = [pytest.mark.integration, pytest.mark.chaos]

FP32 = "extraction={batch_size: 16, slice_rows: 16, precision: fp32, dtype: float32}"


def scoring(folder: Path) -> CacheJob:
    """A scoring of frozen digits, of which one is damaged."""
    made = made_job(folder)
    write_classifier(open_store(made.workspace), "one", made_classifier(open_store(made.workspace), 0))
    return replace(made, verb="score", settings=("dataset=digits", "bundle=one", FP32))


def predictions(job: CacheJob, run: str) -> dict[str, tuple[str, float]]:
    """The class and the score that a run gave each image, by its id."""
    parts = sorted(Path(job.workspace, "runs", run, "predictions").rglob("*.parquet"))
    rows = [row for part in parts for row in pq.read_table(part).to_pylist()]
    return {row["sample_id"]: (row["pred_name"], row["score"]) for row in rows}


def test_a_source_that_changes_loses_its_own_images_and_no_other(
    tmp_path: Path, ray_cluster: None, fault_table: FaultTable
) -> None:
    clean = scoring(tmp_path / "clean")
    undisturbed = predictions(clean, clean.run_here()["run"])
    job, images = scoring(tmp_path), tmp_path / "images"
    Image.new("RGB", (32, 32), "red").save(images / "5" / "00005.jpg")
    (images / "6" / "00006.jpg").unlink()
    (images / "7" / "new.jpg").write_bytes((images / "7" / "00007.jpg").read_bytes())
    report = job.run_here()
    # The third is the one that was damaged from the beginning.
    assert report["reject_codes"] == {"changed": 1, "gone": 1, "truncated": 1}
    assert (report["inputs"], report["results"]) == (job.num_images, job.num_images - 3)
    lost = {"5/00005.jpg", "6/00006.jpg"}
    left = {name: row for name, row in undisturbed.items() if name not in lost}
    assert predictions(job, report["run"]) == left
    fault_table.add(
        "F20 images replaced, deleted, added, score",
        fired=3,
        audit=audit_run(job.workspace, report["run"]),
        clean_digest=None,
    )

    # Frozen anew, all that is there now is scored, and nothing else.
    assert freeze(images, job.workspace)["samples"] == job.num_images
    again = job.run_here()
    assert again["reject_codes"] == {"truncated": 1}
    names = predictions(job, again["run"]).keys()
    assert {"5/00005.jpg", "7/new.jpg"} <= names
    assert "6/00006.jpg" not in names
