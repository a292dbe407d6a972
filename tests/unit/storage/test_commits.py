from __future__ import annotations

import errno
import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from convoy.core.errors import (
    ConditionalWriteUnsupported,
    ConfigError,
    PreconditionFailed,
    RunMismatch,
    StorageError,
)
from convoy.storage.commits import choose_attempts, finish, publish, read_commits, read_manifest, read_records
from convoy.storage.leases import hold_run
from convoy.storage.local_store import LocalStore
from convoy.storage.object_store import Blob
from convoy.storage.run_input import freeze_input, missing_rows
from convoy.storage.runs import (
    OpenRun,
    RunFolder,
    open_pointer,
    open_pointers,
    refuse_changed_identity,
    require_run,
)
from made_runs import NOTHING, SET_ID, finish_slice, made_manifest, new_run

NAMES = [f"s{index:02d}" for index in range(10)]


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path))


def test_published_run_lists_every_slice_once(store: LocalStore) -> None:
    run = new_run(store, NAMES)
    folder = RunFolder(store, run.run_id)
    for name in run.slice_names():
        finish_slice(store, run, name, rejected=["s03"])
    manifest = publish(folder, run, read_records(folder))
    assert [record.slice for record in manifest.slices] == ["0-000000", "0-000001", "0-000002"]
    assert (manifest.num_results, manifest.num_rejects) == (9, 1)
    (commit,) = read_commits(store, SET_ID)
    assert sum(part.num_rows for part in commit.parts) == 9


def test_unfinished_run_is_not_published(store: LocalStore) -> None:
    run = new_run(store, NAMES)
    folder = RunFolder(store, run.run_id)
    finish_slice(store, run, "0-000001")
    with pytest.raises(StorageError, match="2 finished slices"):
        publish(folder, run, read_records(folder))
    assert read_manifest(folder) is None
    assert read_commits(store, SET_ID) == []


def test_a_report_is_json_whatever_its_numbers_are(store: LocalStore) -> None:
    folder = RunFolder(store, new_run(store, NAMES).run_id)
    finish(folder, {"taps": [{"logme": float("nan")}], "speed": float("inf"), "top1": 0.5})

    def refuse(word: str) -> None:
        raise AssertionError(word)

    report = json.loads(store.get(folder.key("report.json")).data, parse_constant=refuse)
    assert report == {"taps": [{"logme": None}], "speed": None, "top1": 0.5}


def test_of_two_attempts_one_is_kept_and_the_other_deleted(store: LocalStore) -> None:
    run = new_run(store, NAMES)
    folder = RunFolder(store, run.run_id)
    for name in run.slice_names():
        finish_slice(store, run, name, attempt="a1")
    loser = finish_slice(store, run, "0-000000", attempt="a2")
    manifest = publish(folder, run, read_records(folder))
    assert [record.attempt for record in manifest.slices] == ["a1", "a1", "a1"]
    keys = {info.key for info in store.list_objects("features/")}
    assert loser.parts[SET_ID].key not in keys
    assert all(file.key in keys for record in manifest.slices for file in record.parts.values())


def test_attempt_that_comes_after_publishing_takes_its_files_back(store: LocalStore) -> None:
    run = new_run(store, NAMES)
    folder = RunFolder(store, run.run_id)
    for name in run.slice_names():
        finish_slice(store, run, name)
    manifest = publish(folder, run, read_records(folder))
    late = finish_slice(store, run, "0-000000", attempt="late", rejected=["s01"])
    keys = {info.key for info in store.list_objects()}
    assert not keys & {file.key for file in late.files}
    assert all(file.key in keys for record in manifest.slices for file in record.files)


def test_orphan_of_a_killed_worker_is_deleted(store: LocalStore) -> None:
    run = new_run(store, NAMES)
    folder = RunFolder(store, run.run_id)
    for name in run.slice_names():
        finish_slice(store, run, name)
    orphan = f"{run.outputs[SET_ID]}part-0-000000-dead.parquet"
    store.put(orphan, b"half a file")
    publish(folder, run, read_records(folder))
    assert orphan not in {info.key for info in store.list_objects("features/")}


def test_orphans_in_partitions_of_the_run_are_deleted_and_its_input_is_not(store: LocalStore) -> None:
    run = new_run(store, NAMES)
    folder = RunFolder(store, run.run_id)
    for name in run.slice_names():
        finish_slice(store, run, name)
    orphans = [folder.key(f"predictions/label_name={name}/part-0-000000-dead.parquet") for name in "ab"]
    for orphan in orphans:
        store.put(orphan, b"half a file")
    partitions = {orphan: orphan.rpartition("/")[0] + "/" for orphan in orphans}
    manifest = publish(
        folder, run.model_copy(update={"outputs": {**run.outputs, **partitions}}), read_records(folder)
    )
    assert not list(store.list_objects(folder.key("predictions/")))
    assert len(list(store.list_objects(folder.key("input/")))) == 1
    assert all(store.head(file.key) for record in manifest.slices for file in record.files)


def test_input_that_was_frozen_and_not_recorded_is_deleted(store: LocalStore) -> None:
    """By a driver that died over it, or that another one had replaced by then."""
    folder = RunFolder(store, "r1")
    rows = missing_rows([made_manifest(NAMES)], {SET_ID: NOTHING})
    freeze_input(folder, rows, slice_rows=2)
    run = new_run(store, NAMES)
    for name in run.slice_names():
        finish_slice(store, run, name)
    publish(folder, run, read_records(folder))
    (kept,) = store.list_objects(folder.key("input/"))
    assert run.groups[0].attempt in kept.key


@pytest.mark.parametrize("damage", ["deleted", "shortened", "replaced"])
def test_record_without_its_file_does_not_count(store: LocalStore, damage: str) -> None:
    run = new_run(store, NAMES)
    folder = RunFolder(store, run.run_id)
    records = [finish_slice(store, run, name) for name in run.slice_names()]
    victim = records[1].parts[SET_ID].key
    data = store.get(victim).data
    if damage == "deleted":
        store.delete([victim])
    else:
        store.put(victim, data[:-1] if damage == "shortened" else bytes(len(data)))
    assert sorted(choose_attempts(folder, run, read_records(folder))) == ["0-000000", "0-000002"]


def test_second_driver_adopts_the_published_choice_and_deletes_none_of_it(store: LocalStore) -> None:
    run = new_run(store, NAMES)
    folder = RunFolder(store, run.run_id)
    for name in run.slice_names():
        finish_slice(store, run, name, attempt="b")
    first = publish(folder, run, read_records(folder))
    for name in run.slice_names():
        finish_slice(store, run, name, attempt="a")
    second = publish(folder, run, read_records(folder))
    assert second == first
    keys = {info.key for info in store.list_objects("features/")}
    assert all(file.key in keys for record in first.slices for file in record.parts.values())


def test_publishing_again_changes_nothing(store: LocalStore) -> None:
    run = new_run(store, NAMES)
    folder = RunFolder(store, run.run_id)
    for name in run.slice_names():
        finish_slice(store, run, name)
    assert publish(folder, run, read_records(folder)) == publish(folder, run, [])
    assert len(read_commits(store, SET_ID)) == 1


def test_digest_of_rows_ignores_slices_and_attempts(store: LocalStore, tmp_path: Path) -> None:
    digests = set()
    for run_id, slice_rows in (("r1", 3), ("r2", 10)):
        run = new_run(store, NAMES, slice_rows=slice_rows, run_id=run_id)
        folder = RunFolder(store, run_id)
        for name in run.slice_names():
            finish_slice(store, run, name, attempt=run_id)
        digests.add(publish(folder, run, read_records(folder)).rows_digest())
    assert len(digests) == 1


def test_unfinished_run_is_found_again_and_a_finished_one_is_not(store: LocalStore) -> None:
    pointer = OpenRun(store, verb="cache", target="t")
    folder = pointer.start()
    assert pointer.resume({}, new_run=False)[0].run_id == folder.run_id  # type: ignore[union-attr]
    assert OpenRun(store, verb="cache", target="other").current() is None
    finish(folder, {})
    assert pointer.resume({}, new_run=False) == (None, None)
    assert pointer.current() is None


def test_a_run_that_ends_leaves_the_pointer_to_a_newer_one_where_it_is(store: LocalStore) -> None:
    first, second = (OpenRun(store, verb="cache", target="t") for _ in range(2))
    left_behind = first.start()
    assert second.resume({}, new_run=True) == (None, None)
    newer = second.start()
    first.close(left_behind)
    current = first.current()
    assert current is not None
    assert current.run_id == newer.run_id
    second.close(newer)
    assert first.current() is None


def test_a_pointer_that_comes_to_name_a_newer_run_while_it_is_closed_stays(tmp_path: Path) -> None:
    """Another driver closes the run, and opens the next one, between the look at the pointer and its end."""

    class OvertakenStore(LocalStore):
        """Whose pointer is taken over right after the first look at it."""

        def get(
            self, key: str, *, byte_range: tuple[int, int] | None = None, wanted_etag: str | None = None
        ) -> Blob:
            blob = LocalStore.get(self, key, byte_range=byte_range, wanted_etag=wanted_etag)
            if not opened:
                other = OpenRun(LocalStore(self.root), verb="cache", target="t")
                opened.append(left_behind)
                other.close(left_behind)
                opened.append(other.start())
            return blob

    opened: list[RunFolder] = []
    left_behind = OpenRun(LocalStore(str(tmp_path)), verb="cache", target="t").start()
    pointer = OpenRun(OvertakenStore(str(tmp_path)), verb="cache", target="t")
    pointer.close(left_behind)
    current = pointer.current()
    assert current is not None
    assert current.run_id == opened[-1].run_id != left_behind.run_id


def test_a_closed_pointer_is_opened_again(store: LocalStore) -> None:
    pointer = OpenRun(store, verb="cache", target="t")
    for _ in range(2):
        folder = pointer.start()
        assert open_pointers(store) == {folder.run_id: folder.open_key}
        open_pointer(store, folder.open_key, folder.run_id)
        with pytest.raises(PreconditionFailed):
            open_pointer(store, folder.open_key, "another")
        pointer.close(folder)
        assert open_pointers(store) == {}


def test_second_process_joins_the_run_that_the_first_opened(store: LocalStore) -> None:
    pointer = OpenRun(store, verb="cache", target="t")
    assert pointer.start().run_id == pointer.start().run_id


def test_run_ids_sort_by_the_time_they_were_opened(store: LocalStore) -> None:
    before = f"{datetime.now(UTC):%Y%m%d-%H%M%S}"
    run_id = OpenRun(store, verb="cache", target="t").start().run_id
    after = f"{datetime.now(UTC) + timedelta(seconds=1):%Y%m%d-%H%M%S}"
    assert before < run_id < after


def test_resume_with_other_inputs_is_refused_and_names_them(store: LocalStore) -> None:
    pointer = OpenRun(store, verb="cache", target="t")
    folder = pointer.start()
    new_run(store, NAMES, run_id=folder.run_id)
    with pytest.raises(RunMismatch, match=r"names: was .*s09.*, is \['x'\]"):
        pointer.resume({"names": ["x"]}, new_run=False)
    assert pointer.resume({"names": ["x"]}, new_run=True) == (None, None)


def test_resume_with_other_libraries_goes_on_and_says_so(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pointer = OpenRun(store, verb="cache", target="t")
    folder = pointer.start()
    record = new_run(store, NAMES, run_id=folder.run_id)
    assert pointer.resume(record.identity, new_run=False)[1] == record
    assert not caplog.records
    versions = {**record.versions, "pillow": "another"}
    monkeypatch.setattr("convoy.storage.runs.current_versions", lambda: versions)
    assert pointer.resume(record.identity, new_run=False)[1] == record
    (said,) = caplog.messages
    assert f"pillow: was '{record.versions['pillow']}', is 'another'" in said
    assert folder.run_id in said


def test_only_the_keys_that_differ_are_shown(store: LocalStore) -> None:
    record = new_run(store, NAMES)
    was = {"config": {"epochs": 5, "recipe": {"seed": 0, "batch_size": 8}}, "names": ["a"]}
    now = {"config": {"epochs": 5, "recipe": {"seed": 1, "batch_size": 8}, "tap": "x"}, "names": ["a"]}
    with pytest.raises(RunMismatch) as mismatch:
        refuse_changed_identity(record.model_copy(update={"identity": was}), now)
    shown = [line.strip() for line in str(mismatch.value).splitlines() if " was " in line]
    assert shown[0] == "config.recipe.seed: was 0, is 1"
    assert shown[1].startswith("config.tap: was None, is 'x'")
    assert len(shown) == 2


def test_unknown_run_names_the_known_ones(store: LocalStore) -> None:
    new_run(store, NAMES, run_id="abc")
    with pytest.raises(ConfigError, match="abc"):
        require_run(store, "nope")


def test_a_single_writer_works_where_the_store_cannot_write_on_condition(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a file system without hard links."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no hard links")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(ConditionalWriteUnsupported):
        store.put_if_absent("probe", b"")
    pointer = OpenRun(store, verb="cache", target="t")
    folder = pointer.start()
    assert pointer.start().run_id == folder.run_id
    with hold_run(folder):
        run = new_run(store, NAMES, run_id=folder.run_id)
        for name in run.slice_names():
            finish_slice(store, run, name)
        published = publish(folder, run, read_records(folder))
        assert publish(folder, run, read_records(folder)) == published
        finish(folder, {})
    pointer.close(folder)
    assert read_manifest(folder) == published
