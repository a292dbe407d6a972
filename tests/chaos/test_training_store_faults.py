"""A store in trouble under a training: its images, its checkpoints and its weights lie on a real S3 server."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import pytest

from cache_jobs import freeze
from chaos_jobs import copied_workspace
from command_lines import last_json
from convoy.storage.stores import open_store
from fault_proxy import (
    ACCESS_DENIED,
    INTERNAL_ERROR,
    FaultProxy,
    FaultRule,
    corrupt_upload,
    lose_answer,
    reset,
)
from train_jobs import LENET, NUM_ROWS, TrainJob, put_images, timeless, write_splits

pytestmark = [pytest.mark.integration, pytest.mark.chaos]

A_CHECKPOINT = "/checkpoints/"
SETTINGS = (
    "name=trained",
    "strategy=from_scratch",
    f"backbone={LENET}",
    "epochs=4",
    "learning_rate=0.02",
    "checkpoint_steps=4",
    "recipe={batch_size: 16, precision: fp32}",
    "extraction={precision: fp32}",
    "workers={cpus_per_worker: 1, max_failures: 1}",
    # The test server does not keep create-if-absent atomic.
    "writers=single",
)
TROUBLE = {
    "F14 500 and resets": [
        FaultRule(action=INTERNAL_ERROR, every=9, start=4),
        FaultRule(action=reset, every=7),
    ],
    "F16, F17 uploads damaged, answers lost": [
        FaultRule(method="PUT", key=A_CHECKPOINT, action=lose_answer, every=2),
        FaultRule(method="PUT", key=A_CHECKPOINT, action=corrupt_upload, times_a_key=1),
    ],
}


@pytest.fixture(scope="module")
def new_job(
    ray_behind_proxy: None, s3_behind_proxy: FaultProxy, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[], TrainJob]:
    """Makes the job in a workspace of its own that has the dataset, and no run."""
    bucket = f"convoy-{uuid.uuid4().hex}"
    s3_behind_proxy.client().create_bucket(Bucket=bucket)
    folder = tmp_path_factory.mktemp("images")
    write_splits(folder)
    put_images(folder, bucket)
    base = open_store(f"s3://{bucket}/base")
    assert freeze(f"s3://{bucket}/images", base.root_uri)["splits"] == NUM_ROWS

    def new() -> TrainJob:
        return TrainJob(copied_workspace(base, f"s3://{bucket}/{uuid.uuid4().hex}"), SETTINGS)

    return new


@pytest.fixture(scope="module")
def clean(new_job: Callable[[], TrainJob]) -> dict[str, Any]:
    """The report of the job without a fault."""
    return new_job().run_here()


def assert_same_training(report: dict[str, Any], clean: dict[str, Any]) -> None:
    assert report["model_digest"] == clean["model_digest"]
    assert timeless(report["history"]) == timeless(clean["history"])
    assert report["train_rejects"] == {}


@pytest.mark.slow
@pytest.mark.parametrize("fault", [*TROUBLE])
def test_a_training_rides_over_a_store_in_trouble(
    fault: str, new_job: Callable[[], TrainJob], clean: dict[str, Any], s3_behind_proxy: FaultProxy
) -> None:
    job = new_job()
    with s3_behind_proxy.injecting(*TROUBLE[fault]) as injected:
        report = job.run_here()
    assert all(one.fired > 0 for one in injected)
    assert_same_training(report, clean)


def test_uploads_that_fail_for_good_end_the_training_which_then_goes_on_from_what_counts(
    new_job: Callable[[], TrainJob], clean: dict[str, Any], s3_behind_proxy: FaultProxy
) -> None:
    job = new_job()
    # A checkpoint is its tensors and its record: the third one fails.
    failing = FaultRule(method="PUT", key=A_CHECKPOINT, action=ACCESS_DENIED, start=5)
    with s3_behind_proxy.injecting(failing) as (injected,):
        finished = job.start_here()
    assert injected.fired > 0
    assert finished.returncode == 1, finished.stderr
    assert A_CHECKPOINT in finished.stderr
    assert [one.step for one in job.checkpoints()] == [8, 4]

    again = job.start_here()
    assert again.returncode == 0, again.stderr
    assert "going on from the checkpoint of step 8" in again.stderr
    assert_same_training(last_json(again), clean)
