"""`convoy cache` with images, and with a workspace, on a real S3 server: the same rows as from a folder."""

from __future__ import annotations

import io
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cache_jobs import CacheJob, cached_features, freeze, made_job
from convoy.storage.datasets import open_dataset
from convoy.storage.stores import open_store
from made_sources import tar_bytes

pytestmark = pytest.mark.integration

NUM_IMAGES = 40


@pytest.fixture(scope="module")
def local_job(tmp_path_factory: pytest.TempPathFactory) -> CacheJob:
    """40 digits in a folder, one of them damaged."""
    return made_job(tmp_path_factory.mktemp("local"), num_images=NUM_IMAGES)


@pytest.fixture
def job(local_job: CacheJob, local_report: dict[str, Any], tmp_path: Path) -> CacheJob:
    """The same job in a workspace that has the network, and nothing else."""
    shutil.copytree(Path(local_job.workspace, "models"), tmp_path / "workspace" / "models")
    return replace(local_job, workspace=str(tmp_path / "workspace"))


@pytest.fixture(scope="module")
def images(local_job: CacheJob) -> dict[str, bytes]:
    """The files of the folder, by sample id, in order."""
    folder = Path(local_job.workspace).parent / "images"
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.jpg"))}


@pytest.fixture(scope="module")
def local_report(local_job: CacheJob, ray_on_s3: dict[str, str]) -> dict[str, Any]:
    return local_job.run_here()


def put(bucket: str, objects: Mapping[str, bytes]) -> None:
    client = boto3.session.Session().client("s3")
    for key, data in objects.items():
        client.put_object(Bucket=bucket, Key=key, Body=data)


def labels(workspace: str, dataset: str) -> list[str]:
    """The class names of the samples, in order."""
    manifest = open_dataset(open_store(workspace), dataset)
    return [manifest.classes[label] for label in manifest.read_table(["label"])["label"].to_pylist()]


def in_order(workspace: str, set_id: str, prefix: str = "") -> np.ndarray:
    """The features of a set in the order of the sample ids, of those that start with the prefix."""
    rows = sorted(cached_features(workspace, set_id).items())
    return np.stack([features_D for sample_id, features_D in rows if sample_id.startswith(prefix)])


def test_bucket_gives_the_rows_of_a_folder(
    s3_bucket: str,
    images: dict[str, bytes],
    local_job: CacheJob,
    local_report: dict[str, Any],
    ray_on_s3: dict[str, str],
) -> None:
    put(s3_bucket, {f"digits/{key}": data for key, data in images.items()})
    job = CacheJob(f"s3://{s3_bucket}/workspace", NUM_IMAGES, local_job.settings)
    assert freeze(f"s3://{s3_bucket}/digits", job.workspace)["samples"] == NUM_IMAGES

    refused = job.start_here()
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "add --set writers=single" in refused.stderr
    assert "Traceback" not in refused.stderr

    job = job.changed("writers=single")
    report = job.run_here()
    assert (report["recomputed"], report["rows"], report["reject_codes"]) == (40, 39, {"truncated": 1})
    proof, local_proof = job.verify(report["run"]), local_job.verify(local_report["run"])
    assert (proof["ok"], local_proof["ok"]) == (True, True)
    assert proof["rows_digest"] == local_proof["rows_digest"]
    # The cache does not depend on where the images lie, only on what they are.
    assert report["sets"] == local_report["sets"]
    again = job.run_here()
    assert (again["recomputed"], again["run"]) == (0, report["run"])


def test_lost_and_changed_objects_are_tried_again_until_they_heal(
    s3_bucket: str, images: dict[str, bytes], job: CacheJob, ray_on_s3: dict[str, str]
) -> None:
    put(s3_bucket, {f"digits/{key}": data for key, data in images.items()})
    source = f"s3://{s3_bucket}/digits"
    freeze(source, job.workspace)
    boto3.session.Session().client("s3").delete_object(Bucket=s3_bucket, Key="digits/3/00003.jpg")
    put(s3_bucket, {"digits/4/00004.jpg": images["4/00014.jpg"]})

    first = job.run_here()
    rejects = {"truncated": 1, "gone": 1, "changed": 1}
    assert first["reject_codes"] == rejects
    assert (first["recomputed"], first["rows"], first["rejects"]) == (40, 37, 3)

    second = job.run_here()
    assert (second["recomputed"], second["reject_codes"]) == (2, rejects)
    assert (second["rows"], second["rejects"]) == (37, 3)

    put(s3_bucket, {"digits/3/00003.jpg": images["3/00003.jpg"]})
    refreshed = freeze(source, job.workspace)
    assert (refreshed["added"], refreshed["changed"], refreshed["removed"]) == (0, 1, 0)
    healed = job.run_here()
    # Content decides: the changed object now holds the bytes of another one, which has features already.
    assert (healed["recomputed"], healed["rows"], healed["rejects"]) == (1, 39, 1)
    assert "3/00003.jpg" in cached_features(job.workspace, healed["sets"]["f6/0"])
    for report in (first, healed):
        assert job.verify(report["run"])["ok"]


def test_tars_and_parquet_files_give_the_features_of_the_folder(
    s3_bucket: str,
    images: dict[str, bytes],
    job: CacheJob,
    local_job: CacheJob,
    local_report: dict[str, Any],
    ray_on_s3: dict[str, str],
) -> None:
    classes = [sample_id.split("/")[0] for sample_id in images]
    members: dict[str, bytes] = {}
    for number, (data, name) in enumerate(zip(images.values(), classes, strict=True)):
        members |= {f"{number:05d}.jpg": data, f"{number:05d}.cls": name.encode()}
    table = pa.table({"image": pa.array(images.values(), pa.binary()), "label": classes})
    file = io.BytesIO()
    pq.write_table(table, file, row_group_size=7)
    put(s3_bucket, {"tars/digits-0.tar": tar_bytes(members), "parquet/digits.parquet": file.getvalue()})

    for kind, prefix in (("tars", "digits-0.tar#"), ("parquet", "digits.parquet#")):
        assert freeze(f"s3://{s3_bucket}/{kind}", job.workspace, name=kind)["kind"] == kind
        assert labels(job.workspace, kind) == classes
        report = job.changed(f"dataset={kind}").run_here()
        assert (report["recomputed"], report["rows"], report["reject_codes"]) == (40, 39, {"truncated": 1})
        for set_id in local_report["sets"].values():
            found = in_order(job.workspace, set_id, prefix)
            assert np.array_equal(found, in_order(local_job.workspace, set_id))
        assert job.verify(report["run"])["ok"]
