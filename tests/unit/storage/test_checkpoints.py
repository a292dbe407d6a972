"""Checkpoints: what counts, what a kill or damage leaves of them, and what pruning may delete."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoint_records import checkpoint_records
from convoy.core.errors import AccessDenied, ChecksumMismatch, ObjectNotFound, StoreUnavailable
from convoy.storage.checkpoints import AsyncCheckpointWriter, CheckpointFolder, CheckpointRecord
from convoy.storage.local_store import LocalStore

LIBRARY = Path(__file__).parents[3] / "lib"
PREFIX = "runs/r1/checkpoints/"


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path))


@pytest.fixture
def folder(store: LocalStore) -> CheckpointFolder:
    return CheckpointFolder(store, "r1")


def write(folder: CheckpointFolder, *steps: int) -> list[CheckpointRecord]:
    return [folder.write(step, b"step %d" % step, details={}) for step in steps]


def steps(folder: CheckpointFolder) -> list[int]:
    return [record.step for record in checkpoint_records(folder._store, "r1")]


def keys(store: LocalStore) -> list[str]:
    return [info.key for info in store.list_objects(PREFIX)]


def test_a_checkpoint_comes_back_with_its_record(store: LocalStore, folder: CheckpointFolder) -> None:
    details = {"epoch": 3, "phase": "head", "history": [{"loss": 0.5, "lr": None}], "shape": (2, 3)}
    record = folder.write(12, b"weights", details=details)
    assert (record.step, record.size_bytes) == (12, 7)
    assert record.details == {**details, "shape": [2, 3]}
    assert record.key.startswith(f"{PREFIX}0000000012-")
    assert checkpoint_records(store, "r1") == [record]
    loaded, damaged = folder.newest_intact()
    assert loaded is not None
    assert (loaded.record, loaded.data, damaged) == (record, b"weights", [])
    assert keys(store) == sorted([record.key, record.record_key])


def test_an_empty_folder_has_none(folder: CheckpointFolder) -> None:
    assert steps(folder) == []
    assert folder.newest_intact() == (None, [])
    folder.prune(keep_newest=1)


def test_records_come_newest_first(folder: CheckpointFolder) -> None:
    write(folder, 9, 1000, 80)
    assert steps(folder) == [1000, 80, 9]


def test_runs_do_not_see_each_other(store: LocalStore, folder: CheckpointFolder) -> None:
    write(CheckpointFolder(store, "r10"), 5)
    write(folder, 1)
    assert steps(folder) == [1]


def test_attempts_at_one_step_do_not_touch_each_other(folder: CheckpointFolder) -> None:
    first = folder.write(5, b"of the first", details={})
    second = folder.write(5, b"of the second", details={})
    assert (folder.read(first), folder.read(second)) == (b"of the first", b"of the second")


@pytest.mark.parametrize("details", [{"history": [{"loss": float("nan")}]}, {"loss": np.float32(1)}])
def test_what_is_no_json_is_refused_before_anything_is_written(
    store: LocalStore, folder: CheckpointFolder, details: dict[str, Any]
) -> None:
    with pytest.raises((ValueError, TypeError)):
        folder.write(1, b"weights", details=details)
    assert keys(store) == []


def damage(store: LocalStore, record: CheckpointRecord, how: str) -> None:
    match how:
        case "data missing":
            store.delete([record.key])
        case "data cut short":
            store.put(record.key, store.get(record.key).data[:-1])
        case "data changed":
            store.put(record.key, bytes(record.size_bytes))
        case "record not JSON":
            store.put(record.record_key, b'{"step": 3')
        case "record of another":
            other = record.key.replace("0000000003", "0000000002")
            store.put(record.record_key, record.model_copy(update={"key": other}).model_dump_json().encode())


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("data missing", "does not exist"),
        ("data cut short", "5 bytes were read"),
        ("data changed", "not the 6 bytes that were recorded"),
        ("record not JSON", "cannot be read"),
        ("record of another", "another checkpoint"),
    ],
)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_is_used(
    store: LocalStore, folder: CheckpointFolder, how: str, reason: str
) -> None:
    records = write(folder, 1, 2, 3)
    damage(store, records[2], how)
    loaded, damaged = folder.newest_intact()
    assert loaded is not None
    assert (loaded.record, loaded.data) == (records[1], b"step 2")
    assert [(one.record_key, one.step) for one in damaged] == [(records[2].record_key, 3)]
    assert reason in damaged[0].reason


def test_all_damaged_ones_are_named_newest_first(store: LocalStore, folder: CheckpointFolder) -> None:
    records = write(folder, 1, 2, 3)
    for record in records:
        damage(store, record, "data missing")
    loaded, damaged = folder.newest_intact()
    assert loaded is None
    assert [one.step for one in damaged] == [3, 2, 1]


def test_discarded_checkpoints_are_gone_and_their_steps_can_be_written_again(
    store: LocalStore, folder: CheckpointFolder
) -> None:
    records = write(folder, 1, 2, 3)
    damage(store, records[2], "data changed")
    folder.discard(folder.newest_intact()[1])
    assert steps(folder) == [2, 1]
    assert len(keys(store)) == 4
    write(folder, 3)
    loaded, damaged = folder.newest_intact()
    assert loaded is not None
    assert (loaded.record.step, damaged) == (3, [])


def test_reading_says_what_is_wrong(store: LocalStore, folder: CheckpointFolder) -> None:
    (record,) = write(folder, 1)
    damage(store, record, "data changed")
    with pytest.raises(ChecksumMismatch, match="step 1 is damaged"):
        folder.read(record)
    store.delete([record.key])
    with pytest.raises(ObjectNotFound):
        folder.read(record)


def test_data_without_a_record_does_not_count(store: LocalStore, folder: CheckpointFolder) -> None:
    write(folder, 1)
    store.put(f"{PREFIX}0000000002-0123abcd.safetensors", b"never recorded")
    assert steps(folder) == [1]
    loaded, damaged = folder.newest_intact()
    assert loaded is not None
    assert (loaded.record.step, damaged) == (1, [])


def test_other_files_in_the_folder_are_left_alone(store: LocalStore, folder: CheckpointFolder) -> None:
    strange = [f"{PREFIX}{name}" for name in ("notes.json", "a/0000000001-0123abcd.json", "1-2.safetensors")]
    for key in strange:
        store.put(key, b"{}")
    write(folder, 1, 2)
    folder.prune(keep_newest=1)
    assert steps(folder) == [2]
    assert set(strange) < set(keys(store))


def test_pruning_keeps_the_newest(store: LocalStore, folder: CheckpointFolder) -> None:
    records = write(folder, *range(6))
    folder.prune(keep_newest=2)
    assert steps(folder) == [5, 4]
    assert len(keys(store)) == 4
    assert all(folder.read(record) == b"step %d" % record.step for record in records[4:])
    folder.prune(keep_newest=1)
    assert steps(folder) == [5]


def test_a_record_of_before_that_has_a_score_counts(store: LocalStore, folder: CheckpointFolder) -> None:
    (record,) = write(folder, 3)
    store.put(record.record_key, record.model_copy(update={"score": 0.75}).model_dump_json().encode())
    loaded, damaged = folder.newest_intact()
    assert loaded is not None
    assert (loaded.record.step, loaded.record.score, damaged) == (3, 0.75, [])
    write(folder, 4)
    folder.prune(keep_newest=1)
    assert steps(folder) == [4]


def test_pruning_must_keep_one(folder: CheckpointFolder) -> None:
    with pytest.raises(ValueError, match="newest"):
        folder.prune(keep_newest=0)


def test_orphans_go_once_a_later_step_counts(store: LocalStore, folder: CheckpointFolder) -> None:
    orphan = f"{PREFIX}0000000002-0123abcd.safetensors"
    store.put(orphan, b"never recorded")
    write(folder, 1, 2)
    folder.prune(keep_newest=5)
    assert orphan in keys(store), "a write of this step may be under way"
    write(folder, 3)
    folder.prune(keep_newest=5)
    assert orphan not in keys(store)
    assert steps(folder) == [3, 2, 1]


@pytest.mark.parametrize("how", ["data missing", "data cut short", "record not JSON"])
def test_a_damaged_checkpoint_does_not_push_out_a_whole_one(
    store: LocalStore, folder: CheckpointFolder, how: str
) -> None:
    records = write(folder, 1, 2, 3)
    damage(store, records[2], how)
    folder.prune(keep_newest=1)
    loaded, _ = folder.newest_intact()
    assert loaded is not None
    assert loaded.record.step == 2
    write(folder, 4)
    folder.prune(keep_newest=1)
    assert len(keys(store)) == 2, "what was damaged goes once a later step counts"


WRITE_TWICE = """
import sys
from convoy.storage.checkpoints import CheckpointFolder
from convoy.storage.local_store import LocalStore
folder = CheckpointFolder(LocalStore(sys.argv[1]), "r1")
for step in (1, 2):
    folder.write(step, b"step %d" % step, details={})
"""


@pytest.mark.parametrize(
    ("point", "num_objects", "newest"), [("checkpoint_written", 3, 1), ("checkpoint_recorded", 4, 2)]
)
def test_a_kill_loses_at_most_the_checkpoint_under_way(
    tmp_path: Path, store: LocalStore, folder: CheckpointFolder, point: str, num_objects: int, newest: int
) -> None:
    environment = {
        **os.environ,
        "CONVOY_CRASH_POINT": f"{point}:2:{tmp_path / 'arrivals'}",
        "PYTHONPATH": str(LIBRARY),
    }
    killed = subprocess.run([sys.executable, "-c", WRITE_TWICE, store.root], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(keys(store)) == num_objects
    loaded, damaged = folder.newest_intact()
    assert loaded is not None
    assert (loaded.record.step, loaded.data, damaged) == (newest, b"step %d" % newest, [])
    write(folder, 3)
    folder.prune(keep_newest=1)
    assert len(keys(store)) == 2


class _GatedStore(LocalStore):
    """A real folder whose writes wait for the test, and fail while it says so."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        for name, value in {"gate": threading.Event(), "entered": threading.Event(), "fails": []}.items():
            object.__setattr__(self, name, value)

    def put(self, key: str, data: bytes) -> str:
        self.entered.set()
        assert self.gate.wait(10)
        if self.fails:
            raise self.fails.pop()
        return super().put(key, data)


class _KeepingStore(LocalStore):
    """A real folder of a role that may write and not delete."""

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            raise AccessDenied(f"no right to delete {key.rpartition('/')[2]}", where=key)


@pytest.fixture
def gated(tmp_path: Path) -> Any:
    return _GatedStore(str(tmp_path))


def writer_to(store: LocalStore) -> AsyncCheckpointWriter:
    return AsyncCheckpointWriter(CheckpointFolder(store, "r1"), keep_newest=2)


def test_the_trainer_goes_on_while_a_checkpoint_is_written(gated: Any) -> None:
    writer = writer_to(gated)
    writer.submit(1, b"one", details={})
    assert gated.entered.wait(10)
    assert keys(gated) == []
    gated.gate.set()
    writer.close()
    assert steps(CheckpointFolder(gated, "r1")) == [1]


def test_one_checkpoint_is_under_way_at_a_time(gated: Any) -> None:
    writer = writer_to(gated)
    writer.submit(1, b"one", details={})
    second = threading.Thread(target=writer.submit, args=(2, b"two"), kwargs={"details": {}})
    second.start()
    second.join(0.2)
    assert second.is_alive(), "the second submit did not wait for the first write"
    gated.gate.set()
    second.join(10)
    writer.close()
    assert steps(CheckpointFolder(gated, "r1")) == [2, 1]


def test_the_background_writer_prunes(store: LocalStore) -> None:
    writer = writer_to(store)
    for step in range(5):
        writer.submit(step, b"data", details={})
    writer.close()
    assert steps(CheckpointFolder(store, "r1")) == [4, 3]


def test_checkpoints_that_cannot_be_deleted_are_told_of_once_and_stop_nothing(tmp_path: Path) -> None:
    store = _KeepingStore(str(tmp_path))
    writer = writer_to(store)
    for step in range(6):
        writer.submit(step, b"data", details={})
    writer.close()
    assert steps(CheckpointFolder(store, "r1")) == [5, 4, 3, 2, 1, 0]
    (note,) = writer.notes
    assert "no right to delete 0000000000-" in note
    assert "convoy runs gc" in note


def test_an_error_surfaces_at_the_next_submit_and_the_one_after_works(gated: Any) -> None:
    gated.gate.set()
    gated.fails.append(StoreUnavailable("down"))
    writer = writer_to(gated)
    writer.submit(1, b"one", details={})
    with pytest.raises(StoreUnavailable):
        writer.submit(2, b"two", details={})
    writer.submit(3, b"three", details={})
    writer.close()
    assert steps(CheckpointFolder(gated, "r1")) == [3]


def test_an_error_of_the_last_checkpoint_surfaces_at_close(gated: Any) -> None:
    gated.gate.set()
    gated.fails.append(StoreUnavailable("down"))
    writer = writer_to(gated)
    writer.submit(1, b"one", details={})
    with pytest.raises(StoreUnavailable):
        writer.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]
    writer.close()
