from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convoy.core.errors import LeaseLost, StorageError
from convoy.storage.feature_cache import KnownContent
from convoy.storage.leases import hold_run
from convoy.storage.local_store import LocalStore
from convoy.storage.run_input import (
    MAX_SLICE_ROWS,
    MAX_SLICES,
    freeze_input,
    missing_rows,
    slice_rows_for,
    write_frozen_record,
)
from convoy.storage.runs import SLICES_PER_INPUT_SHARD, RunFolder, RunRecord, SliceGroup
from made_leases import put_lease
from made_runs import NOTHING, content_id, made_manifest


def known(cached: list[str], rejected: list[str] | None = None) -> KnownContent:
    return KnownContent(
        np.sort(np.array([content_id(name) for name in cached], "S16")),
        np.sort(np.array([content_id(name) for name in rejected or []], "S16")),
    )


def frozen(store: LocalStore, names: list[str], sets: dict[str, KnownContent], slice_rows: int) -> RunRecord:
    batches = [made_manifest(names[start : start + 7]) for start in range(0, len(names), 7)]
    folder = RunFolder(store, "r")
    groups = freeze_input(folder, missing_rows(batches, sets), slice_rows=slice_rows)
    return folder.write_record(record_of(groups))


def record_of(groups: tuple[SliceGroup, ...]) -> RunRecord:
    outputs = dict.fromkeys((output for group in groups for output in group.outputs), "")
    return RunRecord.new("r", verb="cache", identity={}, config={}, outputs=outputs, groups=groups)


def test_rows_are_grouped_by_what_they_lack(tmp_path: Path) -> None:
    names = [f"s{index:02d}" for index in range(12)]
    sets = {"a": known(names[:6]), "b": known(names[3:8], rejected=["s11"])}
    run = frozen(LocalStore(str(tmp_path)), names, sets, slice_rows=5)
    folder = RunFolder(LocalStore(str(tmp_path)), "r")
    wanted = {
        name: run.outputs_of(slice_name)
        for slice_name in run.slice_names()
        for name in folder.read_slice(slice_name)["sample_id"].to_pylist()
    }
    assert wanted == {
        **dict.fromkeys(names[:3], ("b",)),
        **dict.fromkeys(names[6:8], ("a",)),
        **dict.fromkeys(names[8:11], ("a", "b")),
        "s11": ("a",),
    }


@pytest.mark.parametrize("num_rows", [1, 3, 4, 5, 3 * SLICES_PER_INPUT_SHARD + 1])
def test_every_row_lies_in_one_slice_in_manifest_order(tmp_path: Path, num_rows: int) -> None:
    names = [f"s{index:05d}" for index in range(num_rows)]
    store = LocalStore(str(tmp_path))
    run = frozen(store, names, {"a": NOTHING}, slice_rows=3)
    folder = RunFolder(store, "r")
    read = [name for one in run.slice_names() for name in folder.read_slice(one)["sample_id"].to_pylist()]
    assert read == names
    assert run.num_inputs == num_rows


def test_who_freezes_again_leaves_the_recorded_input_as_it_is(tmp_path: Path) -> None:
    """A driver that hung while it froze, and goes on beside the one that took its run over."""
    folder = RunFolder(LocalStore(str(tmp_path)), "r")
    names = [f"s{index}" for index in range(7)]
    rows = [(("a",), made_manifest(names))]
    taken_over = folder.write_record(record_of(freeze_input(folder, rows, slice_rows=3)))
    late = record_of(freeze_input(folder, rows, slice_rows=2))
    assert folder.write_record(late) == taken_over
    sizes = [RunFolder(folder.store, "r").read_slice(name).num_rows for name in taken_over.slice_names()]
    assert sizes == [3, 3, 1]


def test_a_run_that_was_lost_while_its_input_was_frozen_is_not_recorded(tmp_path: Path) -> None:
    folder = RunFolder(LocalStore(str(tmp_path)), "r")
    record = record_of(freeze_input(folder, [(("a",), made_manifest(["s0"]))], slice_rows=3))
    with hold_run(folder) as lease:
        put_lease(folder)
        with pytest.raises(LeaseLost):
            write_frozen_record(folder, record, lease, num_rows=1)
    assert folder.record() is None


@pytest.mark.parametrize("num_rows", [1, 3])
def test_an_input_of_other_rows_than_were_asked_for_is_not_recorded(tmp_path: Path, num_rows: int) -> None:
    folder = RunFolder(LocalStore(str(tmp_path)), "r")
    record = record_of(freeze_input(folder, [(("a",), made_manifest(["s0", "s1"]))], slice_rows=3))
    with hold_run(folder) as lease, pytest.raises(StorageError, match=f"2 rows were frozen of {num_rows}"):
        write_frozen_record(folder, record, lease, num_rows=num_rows)
    assert folder.record() is None


def test_the_input_of_a_run_of_before_freezings_had_names_is_read(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    run = frozen(store, ["s0", "s1"], {"a": NOTHING}, slice_rows=1)
    document = json.loads(store.get("runs/r/run.json").data)
    (shard,) = store.list_objects("runs/r/input/")
    store.put("runs/r/input/0-00000.parquet", store.get(shard.key).data)
    store.delete([shard.key])
    del document["groups"][0]["attempt"]
    store.put("runs/r/run.json", json.dumps(document).encode())
    read = [RunFolder(store, "r").read_slice(name)["sample_id"].to_pylist() for name in run.slice_names()]
    assert read == [["s0"], ["s1"]]


def test_the_largest_slices_come_first_and_remainders_last(tmp_path: Path) -> None:
    folder = RunFolder(LocalStore(str(tmp_path)), "r")
    sizes = {"a": 1, "b": 7, "c": 5}
    rows = [((group,), made_manifest([f"{group}{n}" for n in range(size)])) for group, size in sizes.items()]
    run = folder.write_record(record_of(freeze_input(folder, rows, slice_rows=3)))
    names = run.slice_names_by_size()
    assert names == ["1-000000", "1-000001", "2-000000", "2-000001", "0-000000", "1-000002"]
    assert [folder.read_slice(name).num_rows for name in names] == [3, 3, 3, 2, 1, 1]
    earlier = tuple(group.model_copy(update={"slice_rows": 0}) for group in run.groups)
    assert sorted(run.model_copy(update={"groups": earlier}).slice_names_by_size()) == sorted(names)


def test_nothing_missing_freezes_nothing(tmp_path: Path) -> None:
    run = frozen(LocalStore(str(tmp_path)), ["a", "b"], {"x": known(["a", "b"])}, slice_rows=3)
    assert run.groups == ()


@given(num_rows=st.integers(1, 10**7), batch_size=st.integers(1, 512))
def test_slices_are_whole_batches_and_bounded(num_rows: int, batch_size: int) -> None:
    rows = slice_rows_for(num_rows, batch_size)
    assert rows % batch_size == 0
    assert batch_size <= rows < MAX_SLICE_ROWS + batch_size


@pytest.mark.parametrize(
    ("forward_s", "num_slices"), [(0.0, 8), (32.0, 8), (60.0, 15), (128.0, 32), (10_000.0, 32)]
)
def test_work_of_networks_is_shared_out_more_finely(forward_s: float, num_slices: int) -> None:
    num_rows = 32 * 15 * 16
    assert -(-num_rows // slice_rows_for(num_rows, 16, forward_s)) == num_slices
    # Large inputs have more slices anyway.
    assert slice_rows_for(10**6, 16, forward_s) == MAX_SLICE_ROWS


@given(num_rows=st.integers(10**7, 10**10), batch_size=st.integers(1, 512))
def test_slices_of_huge_inputs_grow_and_do_not_become_more(num_rows: int, batch_size: int) -> None:
    rows = slice_rows_for(num_rows, batch_size)
    assert rows % batch_size == 0
    assert -(-num_rows // rows) <= MAX_SLICES
    assert rows < max(MAX_SLICE_ROWS, -(-num_rows // MAX_SLICES)) + batch_size
