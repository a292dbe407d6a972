"""What `convoy bench plan` plans on: a made manifest, features of most of its rows, half of the slices of a run."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa

from convoy.core.fingerprints import canonical_json, digest
from convoy.core.records import RejectCode, Split
from convoy.storage.commits import PartFile, SetCommit, SliceRecord, feature_prefix, part_key, write_record
from convoy.storage.local_store import LocalStore
from convoy.storage.manifests import (
    MANIFEST_SCHEMA,
    ROWS_PER_GROUP,
    Manifest,
    ManifestHeader,
    SplitCounts,
    write_groups,
)
from convoy.storage.object_store import ObjectStore
from convoy.storage.parts import FeatureRows, write_features
from convoy.storage.predictions import PREDICTIONS
from convoy.storage.run_input import MAX_SLICE_ROWS
from convoy.storage.runs import RunFolder, RunRecord, require_run, slice_name

MANIFEST_KEY = "datasets/made/manifest.parquet"
# The set that has features of all rows but one of so many.
GROWN_SET = digest("grown")
EVERY_MISSING = 10
# Of the slices of a resumed run, one of so many is recorded; of those one of so many has rejects.
_EVERY_RECORDED = 2
_EVERY_WITH_REJECTS = 10
_CLASSES = tuple(f"class_{index:04d}" for index in range(1000))
_NUM_FEATURES = 4
_NUM_THREADS = 16


def make_manifest(root: str, num_rows: int, seed: int) -> None:
    """Samples as a bucket of JPEG files gives them: no column but the empty ones compresses to nothing."""
    random = np.random.default_rng(seed)
    labels = (np.arange(num_rows) * len(_CLASSES) // num_rows).astype(np.int32)
    is_val = random.random(num_rows) < 0.1
    header = ManifestHeader(
        fingerprint=digest([num_rows, seed]),
        num_samples=num_rows,
        classes=_CLASSES,
        counts={Split.TRAIN: _counts(labels[~is_val]), Split.VAL: _counts(labels[is_val])},
        source="s3://images",
    )
    starts = range(0, num_rows, ROWS_PER_GROUP)
    groups = (
        _made_rows(
            start, labels[start : start + ROWS_PER_GROUP], is_val[start : start + ROWS_PER_GROUP], random
        )
        for start in starts
    )
    write_groups(LocalStore(root), MANIFEST_KEY, groups, header)


def commit_features(root: str) -> None:
    """One finished run's parts for most samples, in slices of the usual size; planning never reads the features."""
    store, run_id, parts = LocalStore(root), "made", []
    for number, batch in enumerate(_cached_batches(store)):
        content_ids = batch["content_id"].to_pylist()
        rows = FeatureRows(
            sample_ids=batch["sample_id"].to_pylist(),
            content_ids=content_ids,
            content_digests=content_ids,
            view=0,
            features_BD=np.zeros((batch.num_rows, _NUM_FEATURES), np.float16),
        )
        key = part_key(feature_prefix(GROWN_SET, run_id), slice_name(0, number), "a0")
        parts.append(write_features(store, key, rows, {}))
    commit = SetCommit(run_id=run_id, committed_unix_s=0.0, parts=tuple(parts), rejects=())
    store.put(f"features/{GROWN_SET}/commits/{run_id}.json", canonical_json(commit))


def record_half(root: str, run_id: str) -> None:
    """What workers leave of every second slice of a run of scores: a part, a record, and of some rejects."""
    folder, run = require_run(LocalStore(root), run_id)
    names = list(run.slice_names())[::_EVERY_RECORDED]
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        list(pool.map(lambda item: _record_slice(folder, run, *item), enumerate(names)))


def describe_stored(root: str, run_id: str) -> dict[str, Any]:
    """What of a run grows with its rows, as it lies on disk: numbers of objects, and bytes."""
    store = LocalStore(root)
    folder, run = require_run(store, run_id)
    shards = [info.size_bytes for info in store.list_objects(folder.key("input/"))]
    records = [info.size_bytes for info in store.list_objects(folder.key("records/"))]
    return {
        "slices": run.num_slices,
        "input_shards": len(shards),
        "input_bytes": sum(shards),
        "manifest_bytes": store.head(MANIFEST_KEY).size_bytes,
        "records": len(records),
        "record_bytes": sum(records),
    }


def num_recorded(run: RunRecord) -> int:
    """The slices that `record_half` records."""
    return len(range(0, run.num_slices, _EVERY_RECORDED))


def num_missing(num_rows: int) -> int:
    """The rows without features after `commit_features`."""
    return len(range(0, num_rows, EVERY_MISSING))


def _counts(labels: np.ndarray) -> SplitCounts:
    by_class = np.bincount(labels, minlength=len(_CLASSES))
    return SplitCounts(num_samples=len(labels), by_class=tuple(by_class.tolist()))


def _made_rows(start: int, labels: np.ndarray, is_val: np.ndarray, random: np.random.Generator) -> pa.Table:
    num_rows = len(labels)
    names = [f"train/{_CLASSES[label]}/image_{start + row:09d}.jpg" for row, label in enumerate(labels)]
    md5s = [random.bytes(16).hex() for _ in names]
    content_ids = pa.py_buffer(random.bytes(16 * num_rows))
    columns = {
        "sample_id": pa.array(names),
        "uri": pa.array([f"s3://images/{name}" for name in names]),
        "etag": pa.array(md5s),
        "size_bytes": pa.array(random.integers(20_000, 200_000, num_rows)),
        "offset_bytes": pa.nulls(num_rows, pa.int64()),
        "row_index": pa.nulls(num_rows, pa.int64()),
        "container_field": pa.nulls(num_rows, pa.string()),
        "checksum": pa.array([f"md5:{md5}" for md5 in md5s]),
        "content_id": pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), num_rows, [None, content_ids]),
        "label": pa.array(labels),
        "split": pa.array(np.where(is_val, "val", "train")),
        "weight": pa.array(np.ones(num_rows, np.float32)),
    }
    return pa.table(columns, schema=MANIFEST_SCHEMA)


def _cached_batches(store: ObjectStore) -> Iterator[pa.RecordBatch]:
    first_row = 0
    for batch in Manifest.open(store, MANIFEST_KEY).iter_batches(("sample_id", "content_id")):
        rows = np.arange(first_row, first_row + batch.num_rows)
        first_row += batch.num_rows
        cached = pa.Table.from_batches([batch.filter(pa.array(rows % EVERY_MISSING != 0))])
        yield from cached.combine_chunks().to_batches(MAX_SLICE_ROWS)


def _record_slice(folder: RunFolder, run: RunRecord, number: int, name: str) -> None:
    attempt = f"{number:08x}"
    has_rejects = number % _EVERY_WITH_REJECTS == 0
    key = part_key(run.outputs[PREDICTIONS], name, attempt)
    rejects_key = folder.key(f"rejects/{name}-{attempt}.parquet")
    record = SliceRecord(
        run_id=run.run_id,
        slice=name,
        attempt=attempt,
        parts={PREDICTIONS: _put_part(folder.store, key, MAX_SLICE_ROWS - has_rejects)},
        rejects=_put_part(folder.store, rejects_key, 1) if has_rejects else None,
        num_results=MAX_SLICE_ROWS - has_rejects,
        num_rejects=int(has_rejects),
        reject_codes={RejectCode.CORRUPT: 1} if has_rejects else {},
        flags={"exif_rotated": 3, "grey": 20},
        seconds=dict.fromkeys(("fetch", "decode", "prepare", "forward", "write"), 1.234567 + number),
        started_unix_s=1.7e9 + number,
        first_row_unix_s=1.7e9 + number + 0.5,
        finished_unix_s=1.7e9 + number + 4.25,
        precision_effect={},
    )
    write_record(folder.store, record)


def _put_part(store: ObjectStore, key: str, num_rows: int) -> PartFile:
    """A file that stands for a part: planning compares its size and etag with its record, and reads nothing."""
    data = key.encode()
    return PartFile(
        key=key,
        size_bytes=len(data),
        etag=store.put(key, data),
        checksum=digest(key),
        num_rows=num_rows,
        rows_digest=digest([key, num_rows]),
    )
