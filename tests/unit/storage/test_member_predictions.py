from __future__ import annotations

import sys
import tracemalloc
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from convoy.core.errors import DataError, StorageError
from convoy.storage.commits import PartFile, RunManifest
from convoy.storage.local_store import LocalStore
from convoy.storage.member_predictions import (
    iter_member_parts,
    member_output,
    read_member_logits,
    write_member_predictions,
)
from made_runs import slice_record

NUM_MEMBERS, NUM_VIEWS, NUM_CLASSES = 2, 3, 4


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path))


def logits_MNVK(num_rows: int, seed: int) -> np.ndarray:
    shape = (NUM_MEMBERS, num_rows, NUM_VIEWS, NUM_CLASSES)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def write_part(store: LocalStore, member: int, name: str, labels: list[int | None], seed: int) -> PartFile:
    samples = pa.table({"sample_id": [f"{name}/{row}" for row in range(len(labels))]})
    return write_member_predictions(
        store,
        f"{member_output(member)}/{name}.parquet",
        samples,
        labels=pa.array(labels, pa.int32()),
        logits_NVK=logits_MNVK(len(labels), seed)[member],
        metadata={"convoy.run_id": "r1"},
    )


def made_manifest(store: LocalStore, labels_of: dict[str, list[int | None]]) -> RunManifest:
    records = [
        slice_record(
            name,
            {
                member_output(member): write_part(store, member, name, labels, seed)
                for member in range(NUM_MEMBERS)
            },
            num_results=len(labels),
            attempt="a",
        )
        for seed, (name, labels) in enumerate(labels_of.items())
    ]
    return RunManifest(run_id="r1", slices=tuple(records))


@pytest.mark.parametrize("free_bytes", [None, 0], ids=["in memory", "on disk"])
def test_logits_come_back_by_member_and_view(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, free_bytes: int | None
) -> None:
    monkeypatch.setattr("convoy.core.large_arrays.free_memory_bytes", lambda: free_bytes)
    manifest = made_manifest(store, {"0-000000": [0, 3, 1], "0-000001": [2, 2]})
    found = read_member_logits(store, manifest)
    wanted_MNVK = np.concatenate([logits_MNVK(3, 0), logits_MNVK(2, 1)], axis=1)
    np.testing.assert_array_equal(found.logits_MVNK, wanted_MNVK.transpose(0, 2, 1, 3))
    assert found.labels_N.tolist() == [0, 3, 1, 2, 2]
    assert list(found.sample_ids) == ["0-000000/0", "0-000000/1", "0-000000/2", "0-000001/0", "0-000001/1"]


def test_reading_takes_the_memory_of_the_logits_and_of_a_slice_or_two(store: LocalStore) -> None:
    labels_of: dict[str, list[int | None]] = {f"0-{number:06d}": [0] * 2000 for number in range(8)}
    manifest = made_manifest(store, labels_of)
    tracemalloc.start()
    try:
        found = read_member_logits(store, manifest)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    ids_bytes = sum(map(sys.getsizeof, found.sample_ids))
    assert peak < 1.5 * found.logits_MVNK.nbytes + 2 * ids_bytes


def test_members_from_the_hundredth_on_keep_their_places(store: LocalStore) -> None:
    samples = pa.table({"sample_id": ["a"]})
    parts = {
        member_output(member): write_member_predictions(
            store,
            f"{member_output(member)}/0-000000.parquet",
            samples,
            labels=pa.array([0], pa.int32()),
            logits_NVK=np.full((1, 1, 2), member, np.float32),
            metadata={},
        )
        for member in range(103)
    }
    record = slice_record("0-000000", parts, num_results=1, attempt="a")
    found = read_member_logits(store, RunManifest(run_id="r1", slices=(record,)))
    assert found.logits_MVNK[:, 0, 0, 0].tolist() == list(range(103))


def test_unlabelled_rows_are_left_out(store: LocalStore) -> None:
    manifest = made_manifest(store, {"0-000000": [None, 3], "0-000001": [None, None], "0-000002": [1]})
    labelled = read_member_logits(store, manifest)
    assert (list(labelled.sample_ids), labelled.labels_N.tolist()) == (["0-000000/1", "0-000002/0"], [3, 1])
    np.testing.assert_array_equal(labelled.logits_MVNK[:, :, 0], logits_MNVK(2, 0)[:, 1])


def test_one_part_is_read_at_a_time(store: LocalStore) -> None:
    manifest = made_manifest(store, {"0-000000": [0, None], "0-000001": [1]})
    parts = iter_member_parts(store, manifest)
    first = next(parts)
    assert (first.member, first.sample_ids.to_pylist(), first.labels_N.tolist()) == (0, ["0-000000/0"], [0])
    np.testing.assert_array_equal(first.logits_VNK[:, 0], logits_MNVK(2, 0)[0, 0])
    store.delete([manifest.slices[1].parts[member_output(0)].key])
    assert next(parts).member == 1
    with pytest.raises(StorageError):
        next(parts)


def test_a_run_that_kept_nothing_says_how_to_keep_it(store: LocalStore) -> None:
    with pytest.raises(DataError, match="did not keep its members' predictions") as caught:
        read_member_logits(store, RunManifest(run_id="r1", slices=()))
    assert "keep=views" in caught.value.next_step


def test_the_digest_of_rows_is_over_ids_and_every_view(store: LocalStore) -> None:
    first = write_part(store, 0, "0-000000", [1, 2], seed=0)
    assert write_part(store, 0, "0-000000", [1, 2], seed=0).rows_digest == first.rows_digest
    assert write_part(store, 0, "0-000000", [1, 2], seed=1).rows_digest != first.rows_digest
    assert write_part(store, 0, "0-000001", [1, 2], seed=0).rows_digest != first.rows_digest


def test_other_tools_read_the_views_as_lists(store: LocalStore, tmp_path: Path) -> None:
    write_part(store, 1, "0-000000", [1, None], seed=0)
    rows = duckdb.sql(
        "SELECT sample_id, label, len(logits), logits[2][4]"
        f" FROM read_parquet('{tmp_path}/{member_output(1)}/*.parquet') ORDER BY sample_id"
    ).fetchall()
    wanted = logits_MNVK(2, 0)[1, :, 1, 3]
    assert rows == [("0-000000/0", 1, 3, pytest.approx(wanted[0])), ("0-000000/1", None, 3, wanted[1])]
