"""`convoy train` of a network whose images and workspace lie on a real S3 server, with the image cache of the node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import boto3
import pytest

from cache_jobs import freeze
from convoy.cli.options import load
from convoy.core.config import write_settings
from convoy.pipelines.train_config import TrainConfig
from train_jobs import LENET, NUM_ROWS, TrainJob, put_images, timeless, write_splits

pytestmark = pytest.mark.integration


@pytest.mark.slow
def test_a_second_training_on_the_node_fetches_no_image(
    ray_on_s3: dict[str, str], s3_bucket: str, tmp_path: Path
) -> None:
    """Proved by taking the images away: whoever still asked for one would reject it as gone."""
    write_splits(tmp_path / "images")
    keys = put_images(tmp_path / "images", s3_bucket)
    workspace = f"s3://{s3_bucket}/workspace"
    assert freeze(f"s3://{s3_bucket}/images", workspace)["splits"] == NUM_ROWS
    settings = (
        f"backbone={LENET}",
        "strategy=from_scratch",
        "epochs=2",
        "learning_rate=0.02",
        "recipe={batch_size: 16, precision: fp32}",
        "extraction={precision: fp32}",
        f"local_cache={{folder: {tmp_path / 'cache'}, max_gb: 0.1}}",
        # The test server does not keep create-if-absent atomic.
        "writers=single",
        "name=first",
    )
    job = TrainJob(workspace, settings, ray_on_s3)
    first = job.run_here()
    assert first["history"][-1]["train_loss"] < first["history"][0]["train_loss"]
    assert first["train_rejects"] == {}

    client = boto3.session.Session().client("s3")
    for key in keys:
        client.delete_object(Bucket=s3_bucket, Key=key)
    second = job.changed("name=second").run_here()
    assert second["train_rejects"] == {}
    assert timeless(second["history"]) == timeless(first["history"])
    assert second["model_digest"] == first["model_digest"]

    # Without the cache not one image is to be had, and the training says so.
    finished = job.changed("name=third", "local_cache.max_gb=0", "workers.max_failures=0").start_here()
    assert finished.returncode == 1
    assert "none of 96 training images could be used" in finished.stderr
    assert_no_bundle(workspace, "third")


def test_a_config_is_read_from_the_bucket_in_which_advice_wrote_it(s3_bucket: str) -> None:
    config = {
        "name": "first",
        "dataset": "splits",
        "strategy": "linear_probe",
        "backbone": {"arch": "lenet5"},
    }
    key = "workspace/runs/r/configs/train.first.yaml"
    boto3.session.Session().client("s3").put_object(Bucket=s3_bucket, Key=key, Body=write_settings(config))
    read = load(TrainConfig, f"s3://{s3_bucket}/{key}", None, None)
    assert read == TrainConfig.model_validate(config)


def assert_no_bundle(workspace: str, name: str) -> None:
    bucket, _, prefix = workspace.removeprefix("s3://").partition("/")
    client: Any = boto3.session.Session().client("s3")
    assert client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/models/{name}/")["KeyCount"] == 0
