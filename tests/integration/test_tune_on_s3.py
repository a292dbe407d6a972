"""`convoy tune` with images, workspace, and what Ray Tune itself writes, on a real S3 server."""

from __future__ import annotations

from pathlib import Path

import boto3
import pytest

from cache_jobs import freeze
from command_lines import convoy_here, last_json, settings_arguments
from train_jobs import LENET, put_images, write_splits

pytestmark = pytest.mark.integration


def test_a_search_keeps_its_state_on_s3(ray_on_s3: dict[str, str], s3_bucket: str, tmp_path: Path) -> None:
    assert ray_on_s3
    write_splits(tmp_path / "images")
    put_images(tmp_path / "images", s3_bucket)
    workspace = f"s3://{s3_bucket}/workspace"
    freeze(f"s3://{s3_bucket}/images", workspace)
    settings = settings_arguments(
        "name=search",
        "dataset=digits",
        # The test server does not keep create-if-absent atomic.
        "writers=single",
        f"base.backbone={LENET}",
        "base.recipe={batch_size: 16, precision: fp32}",
        "base.extraction={precision: fp32}",
        "space.config={grid: [{strategy: linear_probe, tap: f6}, {strategy: from_scratch, epochs: 1}]}",
    )
    finished = convoy_here("tune", "--workspace", workspace, *settings, "--json")
    assert finished.returncode == 0, finished.stderr
    report = last_json(finished)
    assert [trial["state"] for trial in report["trials"]] == ["finished"] * 2, report["trials"]
    client = boto3.session.Session().client("s3")
    listed = client.list_objects_v2(Bucket=s3_bucket, Prefix=f"workspace/runs/{report['run']}/")["Contents"]
    names = [entry["Key"].partition(f"{report['run']}/")[2] for entry in listed]
    assert {f"trials/{trial['trial']}.json" for trial in report["trials"]} <= set(names)
    assert "_SUCCESS" in names
    assert not [name for name in names if name.endswith(".pkl")], "pickles stay behind"
