"""Manifests: written sorted, fingerprinted, and streamed back."""

from __future__ import annotations

import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convoy.core.errors import DataError, ObjectNotFound
from convoy.core.fingerprints import digest_bytes
from convoy.core.records import Split
from convoy.storage.local_store import LocalStore
from convoy.storage.manifests import (
    MANIFEST_SCHEMA,
    ROWS_PER_GROUP,
    Manifest,
    fingerprint_samples,
    iter_sorted,
    with_long_columns,
)
from made_manifests import write_samples

CLASSES = ("cat", "dog")


def samples_of(*ids: str, root: str = "/data", label: int | None = 1, split: str = "train") -> pa.Table:
    rows = [
        {
            "sample_id": sample_id,
            "uri": f"{root}/{sample_id}",
            "etag": "e",
            "size_bytes": 7,
            "content_id": digest_bytes(sample_id.encode()),
            "label": label,
            "split": split,
            "weight": 1.0,
        }
        for sample_id in ids
    ]
    return pa.Table.from_pylist(rows, MANIFEST_SCHEMA)


def write(root: Path, samples: pa.Table, key: str = "m.parquet") -> Manifest:
    return write_samples(LocalStore(str(root)), samples, CLASSES, key=key)


def test_rows_come_back_in_the_byte_order_of_their_ids(tmp_path: Path) -> None:
    ids = ["ä", "a/b", "a-b", "Z", "\U0001f600", "\uffff", "a b", "new\nline"]
    manifest = write(tmp_path, samples_of(*ids))
    assert manifest.read_table()["sample_id"].to_pylist() == sorted(ids, key=str.encode)
    assert manifest.read_table().schema.equals(MANIFEST_SCHEMA)


def test_batches_stream_by_row_groups_with_the_columns_that_were_asked_for(tmp_path: Path) -> None:
    manifest = write(tmp_path, samples_of(*(f"{index:06d}" for index in range(ROWS_PER_GROUP + 3))))
    batches = list(manifest.iter_batches(["label", "sample_id"]))
    assert [batch.num_rows for batch in batches] == [ROWS_PER_GROUP, 3]
    assert batches[0].schema.names == ["label", "sample_id"]


def test_splits_filter_rows_and_counts_tell_them(tmp_path: Path) -> None:
    rows = [samples_of("a", "b", split="train"), samples_of("c", split="val", label=0)]
    manifest = write(tmp_path, pa.concat_tables([*rows, samples_of("d", split="test", label=None)]))
    assert manifest.read_table(["sample_id"], splits=[Split.VAL, Split.TEST])["sample_id"].to_pylist() == [
        "c",
        "d",
    ]
    assert manifest.counts[Split.TRAIN].by_class == (0, 2)
    assert manifest.counts[Split.TEST].num_unlabelled == 1


def test_a_doubled_id_is_refused_also_across_row_groups(tmp_path: Path) -> None:
    ids = [f"{index:06d}" for index in range(ROWS_PER_GROUP + 1)]
    ids[-1] = ids[-2]
    with pytest.raises(DataError, match=ids[-1]):
        list(iter_sorted(samples_of(*ids)))


@given(st.permutations(["a", "b", "c", "d"]))
def test_the_fingerprint_does_not_depend_on_the_order_or_place(ids: list[str]) -> None:
    moved = fingerprint_samples(samples_of(*ids, root="s3://elsewhere"), CLASSES)
    assert moved == fingerprint_samples(samples_of("a", "b", "c", "d"), CLASSES)


@pytest.mark.parametrize(
    ("samples", "classes"),
    [
        (samples_of("a", "c"), CLASSES),
        (samples_of("a"), CLASSES),
        (samples_of("a", "b", label=0), CLASSES),
        (samples_of("a", "b", label=None), CLASSES),
        (samples_of("a", "b", split="val"), CLASSES),
        (samples_of("a", "b"), ("cat", "cow")),
        (samples_of("a", "b"), (*CLASSES, "eel")),
    ],
)
def test_the_fingerprint_depends_on_everything_else(samples: pa.Table, classes: tuple[str, ...]) -> None:
    assert fingerprint_samples(samples, classes) != fingerprint_samples(samples_of("a", "b"), CLASSES)


def test_a_fingerprint_never_changes_between_releases() -> None:
    assert fingerprint_samples(samples_of("a", "ä"), CLASSES) == "a0188f9a63e8975cc06900a044760172"


def test_a_handle_pickles(tmp_path: Path) -> None:
    manifest = pickle.loads(pickle.dumps(write(tmp_path, samples_of("a"))))
    assert manifest.num_samples == manifest.read_table().num_rows == 1


def test_other_parquet_files_are_no_manifests(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(DataError, match="not a manifest"):
        Manifest.open(LocalStore(str(tmp_path)), "other.parquet")
    with pytest.raises(ObjectNotFound):
        Manifest.open(LocalStore(str(tmp_path)), "missing.parquet")


def test_texts_of_more_than_two_gigabytes_have_long_offsets_while_they_are_sorted() -> None:
    rows = pa.table(
        {"sample_id": pa.chunked_array([["b"], ["a"]], pa.string()), "label": pa.array([1, 0], pa.int32())}
    )
    long = with_long_columns(rows)
    assert long.schema.types == [pa.large_string(), pa.int32()]
    assert long["sample_id"].num_chunks == 1
    (group,) = iter_sorted(rows)
    assert group.schema == rows.schema
    assert group["sample_id"].to_pylist() == ["a", "b"]
