"""Datasets frozen from a real S3 server, and from CIFAR-10 on disk."""

from __future__ import annotations

import json
import os
from pathlib import Path

import boto3
import pytest

from cifar_images import ARCHIVE, unpack
from convoy.core.records import RejectCode, SampleRejected
from convoy.pipelines.dataset import DatasetConfig, DatasetReport, freeze
from convoy.storage.datasets import open_dataset
from convoy.storage.samples import SampleReader
from convoy.storage.stores import open_store
from made_sources import jpeg_bytes, shard_bytes

pytestmark = pytest.mark.integration


def put(bucket: str, objects: dict[str, bytes]) -> None:
    client = boto3.session.Session().client("s3")
    for key, data in objects.items():
        client.put_object(Bucket=bucket, Key=key, Body=data)


def read(workspace: str, name: str) -> list[bytes | SampleRejected]:
    rows = open_dataset(open_store(workspace), name).read_table()
    return [data for _, data in SampleReader(num_threads=4).read(rows)]


def freeze_bucket(bucket: str, folder: str) -> DatasetReport:
    config = DatasetConfig(
        workspace=f"s3://{bucket}/workspace", name="pets", source=f"s3://{bucket}/{folder}"
    )
    report = freeze(config)
    json.dumps(report.model_dump(mode="json"))
    return report


def test_class_folders_in_a_bucket_are_frozen_read_and_refreshed(s3_bucket: str) -> None:
    objects = {f"data/{split}/{name}/{index} ä+.jpg": jpeg_bytes(index) for index in range(3)
               for split in ("train", "test") for name in ("cat", "dog")}  # fmt: skip
    put(
        s3_bucket,
        {**objects, "data/train/cat/": b"", "data/README.md": b"text", "database/cat/1.jpg": b"other"},
    )
    report = freeze_bucket(s3_bucket, "data")
    assert (report.samples, report.skipped, report.splits["test"]) == (12, {"side_file": 1}, 6)
    assert read(f"s3://{s3_bucket}/workspace", "pets") == [
        objects[f"data/{key}"] for key in _sorted_keys(objects)
    ]
    assert any("several splits" in warning for warning in report.warnings)

    put(s3_bucket, {"data/train/cat/new.jpg": jpeg_bytes(9), "data/train/dog/0 ä+.jpg": jpeg_bytes(8)})
    boto3.session.Session().client("s3").delete_object(Bucket=s3_bucket, Key="data/test/cat/0 ä+.jpg")
    stale = open_dataset(open_store(f"s3://{s3_bucket}/workspace"), "pets").read_table()
    again = freeze_bucket(s3_bucket, "data")
    assert (again.added, again.changed, again.removed, again.samples) == (1, 1, 1, 12)
    outcomes = [data for _, data in SampleReader(num_threads=4).read(stale)]
    assert [data.code for data in outcomes if isinstance(data, SampleRejected)] == [
        RejectCode.GONE,
        RejectCode.CHANGED,
    ]
    assert freeze_bucket(s3_bucket, "data").fingerprint == again.fingerprint != report.fingerprint


def test_a_copy_in_another_folder_keeps_its_fingerprint(s3_bucket: str) -> None:
    for folder in ("here", "there"):
        put(
            s3_bucket,
            {f"{folder}/{name}/{index}.jpg": jpeg_bytes(index) for name in "ab" for index in range(3)},
        )
    report, copy = freeze_bucket(s3_bucket, "here"), freeze_bucket(s3_bucket, "there")
    assert (copy.fingerprint, copy.moved, copy.added) == (report.fingerprint, 6, 0)
    uris = (
        open_dataset(open_store(f"s3://{s3_bucket}/workspace"), "pets").read_table(["uri"])["uri"].to_pylist()
    )
    assert all(uri.startswith(f"s3://{s3_bucket}/there/") for uri in uris)


def test_tar_shards_in_a_bucket_are_read_by_range(s3_bucket: str) -> None:
    labels = {f"{index:03d}": ("cat", "dog")[index % 2] for index in range(20)}
    put(s3_bucket, {"shards/train-0.tar": shard_bytes(labels), "shards/test-0.tar": shard_bytes(labels)})
    report = freeze_bucket(s3_bucket, "shards")
    assert (report.samples, report.splits["test"]) == (40, 20)
    assert read(f"s3://{s3_bucket}/workspace", "pets") == [jpeg_bytes(index) for index in range(20)] * 2


def test_a_list_in_a_bucket_finds_its_objects(s3_bucket: str) -> None:
    lines = "".join(f"s3://{s3_bucket}/a//{index}.jpg,cat\n" for index in range(3)) + "here.jpg,dog\n"
    objects = {f"a//{index}.jpg": jpeg_bytes(index) for index in range(3)}
    put(
        s3_bucket,
        {**objects, "lists/here.jpg": jpeg_bytes(5), "lists/all.csv": f"path,label\n{lines}".encode()},
    )
    assert freeze_bucket(s3_bucket, "lists/all.csv").samples == 4
    assert sorted(map(str, read(f"s3://{s3_bucket}/workspace", "pets"))) == sorted(
        str(jpeg_bytes(index)) for index in (0, 1, 2, 5)
    )


def test_cifar_10_keeps_its_test_rows_and_gives_a_tenth_of_train_to_val(tmp_path: Path) -> None:
    if not ARCHIVE.exists():
        pytest.skip(f"no {ARCHIVE}; set CONVOY_TEST_DATA to the folder that has it")
    unpack(tmp_path / "unpacked")
    (source,) = (path.parent for path in (tmp_path / "unpacked").rglob("train"))
    config = DatasetConfig(workspace=str(tmp_path / "workspace"), name="cifar10", source=str(source))
    report = freeze(config)
    assert (report.samples, report.splits["test"], report.warnings) == (60_000, 10_000, ())
    assert abs(report.splits["val"] - 5000) < 300
    for path in sorted((source / "train/cat").iterdir())[:1000]:
        os.link(path, path.with_name(f"copy-{path.name}"))
    again = freeze(config)
    assert (again.added, again.changed, again.removed, again.samples) == (1000, 0, 0, 61_000)


def _sorted_keys(objects: dict[str, bytes]) -> list[str]:
    return sorted((key.removeprefix("data/") for key in objects), key=str.encode)
