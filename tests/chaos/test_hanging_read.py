"""A read never ends: the worker that waits for it ends itself, and another one does its work."""

from __future__ import annotations

from math import inf
from pathlib import Path

import numpy as np
import pytest

from cache_jobs import cached_features, made_job
from chaos_jobs import FaultTable, audit_run
from hanging_image import HangingImage
from train_jobs import LENET, TrainJob, frozen_digits, timeless

pytestmark = [pytest.mark.integration, pytest.mark.chaos]

# Six seconds.
EXTRACTION = (
    "extraction={precision: fp32, batch_size: 16, slice_rows: 16, num_workers: 1, stall_minutes: 0.1}"
)


@pytest.fixture
def aside(tmp_path: Path) -> Path:
    return tmp_path / "aside.jpg"


def test_a_slice_whose_read_hangs_is_done_by_another_worker(
    tmp_path: Path, aside: Path, ray_cluster: None, fault_table: FaultTable
) -> None:
    clean = made_job(tmp_path).changed(EXTRACTION)
    job = clean.copied_to(tmp_path / "faulty")
    clean_run = clean.run_here()["run"]
    with HangingImage(tmp_path / "images" / "7" / "00007.jpg", aside, worker=r"MapWorker.*\.submit") as image:
        report = job.run_here()
    assert len(image.ended) == 1
    # None but the damaged one.
    assert report["rejects"] == 1
    assert {len(attempts) for attempts in job.attempts().values()} == {1}
    fault_table.add(
        "F26 a read hangs, cache",
        fired=len(image.ended),
        audit=audit_run(job.workspace, report["run"]),
        clean_digest=audit_run(clean.workspace, clean_run).digest,
    )


def test_an_image_whose_read_always_hangs_becomes_a_reject_that_heals(
    tmp_path: Path, aside: Path, ray_cluster: None, fault_table: FaultTable
) -> None:
    clean = made_job(tmp_path).changed(EXTRACTION)
    job = clean.copied_to(tmp_path / "faulty")
    clean.run_here()
    path = tmp_path / "images" / "7" / "00007.jpg"
    with HangingImage(path, aside, worker=r"MapWorker.*\.submit", num_deaths=inf) as image:
        report = job.run_here()
        # Two with the slice, and two with nothing but the image.
        assert len(image.ended) == 4
    assert report["reject_codes"] == {"ends_workers": 1, "truncated": 1}
    fault_table.add(
        "F26 a read always hangs, cache",
        fired=len(image.ended),
        audit=audit_run(job.workspace, report["run"]),
        clean_digest=None,
    )
    again = job.run_here()
    assert (again["reject_codes"], again["recomputed"]) == ({"truncated": 1}, 1)
    healed, wanted = (cached_features(one.workspace, again["sets"]["f6/0"]) for one in (job, clean))
    assert healed.keys() == wanted.keys()
    assert all(np.array_equal(healed[name], wanted[name]) for name in wanted)


@pytest.mark.slow
def test_a_training_whose_read_hangs_goes_on_in_another_worker(
    tmp_path: Path, aside: Path, ray_cluster: None
) -> None:
    workspace = frozen_digits(tmp_path)
    settings = (
        "workers={cpus_per_worker: 1, max_failures: 1}",
        f"backbone={LENET}",
        "strategy=from_scratch",
        "epochs=2",
        "learning_rate=0.02",
        "recipe={batch_size: 16, precision: fp32}",
        EXTRACTION,
    )
    clean = TrainJob(workspace, (*settings, "name=clean"))
    expected = clean.run_here()
    with HangingImage(
        tmp_path / "images" / "train" / "7" / "00007.jpg", aside, worker="TrainWorker"
    ) as image:
        report = TrainJob(workspace, (*settings, "name=faulty")).run_here()
    assert len(image.ended) == 1
    assert timeless(report["history"]) == timeless(expected["history"])
