"""A node's image cache in front of a real S3 server: proved by taking the objects away between two passes."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from convoy.cluster.prepared_batches import ImagePreparer
from convoy.cluster.stall_watch import StallWatch
from convoy.core.records import RejectCode, SampleRejected
from convoy.core.splits import SplitOptions
from convoy.storage.local_cache import LocalImageCache
from convoy.storage.samples import SampleReader
from convoy.storage.sources.completion import complete_rows
from convoy.storage.sources.reading import read_source
from convoy.storage.sources.rows import ReadingOptions
from convoy.vision.decode_rule import DecodeRule
from made_sources import jpeg_bytes, tar_bytes

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ample_disk")]

NUM_IMAGES = 20
IMAGES = [jpeg_bytes(index * 1009) for index in range(NUM_IMAGES)]


def parquet_bytes() -> bytes:
    file = io.BytesIO()
    images = [{"bytes": data, "path": None} for data in IMAGES]
    pq.write_table(pa.table({"image": images}), file, row_group_size=6)
    return file.getvalue()


SOURCES: dict[str, dict[str, bytes]] = {
    "objects": {f"cat/{index:02d}.jpg": data for index, data in enumerate(IMAGES)},
    "tars": {"0.tar": tar_bytes({f"{index:02d}.jpg": data for index, data in enumerate(IMAGES)})},
    "parquet": {"a.parquet": parquet_bytes()},
}


class Bucket:
    """A source in a bucket, and its samples as they were frozen."""

    def __init__(self, name: str, objects: Mapping[str, bytes]) -> None:
        self._name, self._keys = name, list(objects)
        self._client = boto3.session.Session().client("s3")
        for key, data in objects.items():
            self._client.put_object(Bucket=name, Key=key, Body=data)
        scan = read_source(f"s3://{name}", ReadingOptions())[1]
        self.rows = complete_rows(scan, SplitOptions())[0].sort_by("sample_id")

    def empty(self) -> None:
        """Take all objects away: whoever still asks for one is told that it is gone."""
        for key in self._keys:
            self._client.delete_object(Bucket=self._name, Key=key)


@pytest.fixture
def cache(tmp_path: Path) -> LocalImageCache:
    return LocalImageCache(str(tmp_path / "cache"), 1 << 20)


def read(rows: pa.Table, cache: LocalImageCache, **options: Any) -> list[bytes | RejectCode]:
    results = list(SampleReader(cache=cache, **options).read(rows))
    assert [row for row, _ in results] == list(range(rows.num_rows))
    return [data.code if isinstance(data, SampleRejected) else data for _, data in results]


@pytest.mark.parametrize("kind", SOURCES)
def test_a_second_pass_asks_for_nothing(kind: str, s3_bucket: str, cache: LocalImageCache) -> None:
    bucket = Bucket(s3_bucket, SOURCES[kind])
    assert read(bucket.rows, cache) == IMAGES
    bucket.empty()
    assert read(bucket.rows, cache) == IMAGES
    order = [13, 2, 19, 2, 0]
    assert read(bucket.rows.take(pa.array(order)), cache, window_reads=1) == [IMAGES[row] for row in order]
    assert (cache.counts.hits, cache.counts.misses) == (NUM_IMAGES + len(order), NUM_IMAGES)
    assert cache.counts.admitted_bytes == sum(map(len, IMAGES))


def test_what_trainings_have_read_is_predicted_without_asking_for_it_again(
    s3_bucket: str, cache: LocalImageCache
) -> None:
    bucket = Bucket(s3_bucket, SOURCES["objects"])
    read(bucket.rows, cache)
    bucket.empty()
    usable = []
    for known in (cache, None):
        preparer = ImagePreparer[str](
            DecodeRule(),
            num_fetch_threads=None,
            num_decode_threads=1,
            fill=lambda *_: None,
            watch=StallWatch(),
            cache=known,
        )
        images = preparer.begin(bucket.rows, None)
        list(preparer.batches(images, lambda: {"whole": torch.empty(8)}, 8))
        usable.append(int(images.usable_N.sum()))
    assert usable == [NUM_IMAGES, 0]


@pytest.mark.parametrize("kind", SOURCES)
def test_what_did_not_fit_is_fetched_in_its_place(
    kind: str, s3_bucket: str, cache: LocalImageCache, tmp_path: Path
) -> None:
    bucket = Bucket(s3_bucket, SOURCES[kind])
    half = LocalImageCache(str(tmp_path / "half"), sum(len(data) + 16 for data in IMAGES) // 2)
    for _epoch in range(2):
        assert read(bucket.rows, half) == IMAGES
    num_cached = half.counts.hits
    assert 0 < num_cached < NUM_IMAGES
    bucket.empty()
    outcomes = read(bucket.rows, half)
    assert outcomes.count(RejectCode.GONE) == NUM_IMAGES - num_cached
    assert all(data in (image, RejectCode.GONE) for data, image in zip(outcomes, IMAGES, strict=True))


def test_a_parquet_row_whose_cached_file_is_damaged_is_read_from_its_file(
    s3_bucket: str, cache: LocalImageCache
) -> None:
    bucket = Bucket(s3_bucket, SOURCES["parquet"])
    read(bucket.rows, cache)
    for row in (3, 4, 11):
        (path,) = Path(cache.folder).rglob(bucket.rows["content_id"][row].as_py().hex())
        path.write_bytes(path.read_bytes()[:-1])
    assert read(bucket.rows, cache) == IMAGES
    assert cache.counts.notes == {"a damaged file was deleted": 3}
    bucket.empty()
    assert read(bucket.rows, cache) == IMAGES, "what was read again was admitted again"


def test_the_size_limit_holds_for_cached_parquet_rows(s3_bucket: str, cache: LocalImageCache) -> None:
    bucket = Bucket(s3_bucket, SOURCES["parquet"])
    read(bucket.rows, cache)
    assert set(read(bucket.rows, cache, max_bytes=10)) == {RejectCode.TOO_LARGE}
