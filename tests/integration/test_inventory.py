"""A report of S3 Inventory about a real bucket, as a dataset and through `convoy cache`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import boto3
import pytest

from cache_jobs import LENET, CacheJob, cached_features, freeze, write_digits
from command_lines import convoy_json_here
from convoy.pipelines.dataset import DatasetConfig
from convoy.pipelines.dataset import freeze as freeze_dataset
from convoy.storage.sources.rows import ReadingOptions
from made_inventories import MANIFEST_KEY, REPORT, made_report

pytestmark = pytest.mark.integration

NUM_IMAGES = 24
CHANGED, GONE = "photos/3/00003.jpg", "photos/4/00004.jpg"


def put(bucket: str, objects: Mapping[str, bytes]) -> None:
    client = boto3.session.Session().client("s3")
    for key, data in objects.items():
        client.put_object(Bucket=bucket, Key=key, Body=data)


def entries(bucket: str) -> list[dict[str, Any]]:
    """What S3 would write about the objects of a bucket that has no more than a page of them."""
    listed = boto3.session.Session().client("s3").list_objects_v2(Bucket=bucket)["Contents"]
    return [
        {
            "Key": found["Key"],
            "Size": found["Size"],
            "LastModifiedDate": found["LastModified"].isoformat(),
            "ETag": found["ETag"].strip('"'),
        }
        for found in listed
    ]


@pytest.fixture
def bucket(s3_bucket: str, tmp_path: Path) -> str:
    """Digits in class folders below `photos/`, a file beside them, and a report about all of it."""
    write_digits(tmp_path / "images", NUM_IMAGES)
    files = sorted((tmp_path / "images").rglob("*.jpg"))
    put(s3_bucket, {f"photos/{path.relative_to(tmp_path / 'images')}": path.read_bytes() for path in files})
    put(s3_bucket, {"logs/ä +1.txt": b"no image"})
    rows = entries(s3_bucket)
    fields = ("Bucket", "Key", "Size", "LastModifiedDate", "ETag")
    put(s3_bucket, made_report(s3_bucket, [rows[:10], rows[10:]], fields=fields))
    return s3_bucket


def test_a_report_and_a_listing_give_the_same_dataset(bucket: str, tmp_path: Path) -> None:
    workspace = str(tmp_path / "workspace")
    listed = freeze(f"s3://{bucket}/photos", workspace, name="listed")
    for source in (f"s3://{bucket}/{MANIFEST_KEY}", f"s3://{bucket}/{REPORT}"):
        reported = freeze_dataset(
            DatasetConfig(
                workspace=workspace,
                name="reported",
                source=source,
                reading=ReadingOptions(images_root=f"s3://{bucket}/photos"),
            )
        )
        assert (reported.kind, reported.samples) == ("inventory", NUM_IMAGES)
        assert reported.fingerprint == listed["fingerprint"]
        assert reported.skipped == {"outside": 1}


def test_what_changed_or_went_since_the_report_is_a_reject(
    bucket: str, tmp_path: Path, ray_on_s3: dict[str, str]
) -> None:
    put(bucket, {CHANGED: b"another image"})
    boto3.session.Session().client("s3").delete_object(Bucket=bucket, Key=GONE)
    put(bucket, {"photos/0/later.jpg": b"not in the report"})
    workspace = str(tmp_path / "workspace")
    arguments = ["--set", f"reading.images_root=s3://{bucket}/photos", "--workspace", workspace]
    frozen = convoy_json_here("dataset", f"s3://{bucket}/{MANIFEST_KEY}", "--name", "digits", *arguments)
    assert frozen["samples"] == NUM_IMAGES

    settings = ("dataset=digits", f"backbone={LENET}", "taps=[f6]", "extraction={precision: fp32}")
    job = CacheJob(workspace, NUM_IMAGES, settings)
    report = job.run_here()
    assert report["reject_codes"] == {"changed": 1, "gone": 1}
    assert (report["rows"], report["rejects"]) == (NUM_IMAGES - 2, 2)
    (set_id,) = report["sets"].values()
    kept = set(cached_features(workspace, set_id))
    assert {CHANGED.removeprefix("photos/"), GONE.removeprefix("photos/")}.isdisjoint(kept)
    assert job.verify(report["run"])["ok"]
