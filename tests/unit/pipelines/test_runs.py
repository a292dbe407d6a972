"""What `convoy runs` says of runs, and how it gives them up, repairs them and clears them away."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from convoy.cluster.slices import PlannedWork
from convoy.core.errors import ConfigError, DataError, LeaseHeld, RunCancelled
from convoy.core.progress import Silent
from convoy.core.records import RejectCode
from convoy.pipelines.feature_plan import ExtractionConfig
from convoy.pipelines.feature_summary import seconds_under_way
from convoy.pipelines.prediction_request import SCORE
from convoy.pipelines.runs_cancel import cancel_run
from convoy.pipelines.runs_diff import ChangedPrediction, diff_runs
from convoy.pipelines.runs_gc import GcReport, collect_garbage
from convoy.pipelines.runs_list import ListedRun, list_runs
from convoy.pipelines.runs_repair import repair_run
from convoy.pipelines.runs_show import show_run
from convoy.pipelines.runs_state import Changes, RunState, age_in_words, opened_utc
from convoy.pipelines.score import FORECASTS
from convoy.pipelines.slice_work import do_slices
from convoy.pipelines.verify import verify_run
from convoy.storage.checkpoints import CheckpointFolder
from convoy.storage.commits import (
    SliceRecord,
    choose_attempts,
    finish,
    publish,
    read_commits,
    read_manifest,
    read_records,
    record_key,
    write_record,
)
from convoy.storage.conditional_put import PROBE_FOLDER
from convoy.storage.datasets import freeze_dataset
from convoy.storage.leases import WhenHeld, give_up, hold_run, is_given_up, take_up
from convoy.storage.local_store import LOCK_NAME, LocalStore
from convoy.storage.local_walk import PRIVATE_PREFIX
from convoy.storage.object_store import ObjectStore
from convoy.storage.predictions import PREDICTIONS, predictions_table, write_predictions
from convoy.storage.run_input import freeze_input, missing_rows
from convoy.storage.runs import INPUT, OpenRun, RunFolder, RunRecord, open_pointers
from made_leases import put_lease
from made_runs import NOTHING, SET_ID, finish_slice, made_manifest, new_run, slice_record
from made_sources import write_files

NAMES = [f"s{index:02d}" for index in range(10)]
SLICES = ["0-000000", "0-000001", "0-000002"]
OLD = "20200101-000000-00000000"


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path))


def opened(
    store: ObjectStore, target: str = "t", *, verb: str = "cache"
) -> tuple[OpenRun, RunFolder, RunRecord]:
    """A run that the command of a target would go on with: three slices, none of them done."""
    pointer = OpenRun(store, verb=verb, target=target)
    folder = pointer.start()
    prefix = None if verb == "cache" else folder.key(f"{PREDICTIONS}/")
    new_run(store, NAMES, run_id=folder.run_id, open_key=folder.open_key, verb=verb, prefix=prefix)
    record = folder.record()
    assert record is not None
    return pointer, folder, record


def do_rest(folder: RunFolder, record: RunRecord, *, attempt: str = "a0") -> list[str]:
    """What a job's command does: the slices without a verified attempt, then publish; the slices that it did."""
    done = choose_attempts(folder, record, read_records(folder))
    todo = [name for name in record.slice_names() if name not in done]
    for name in todo:
        finish_slice(folder.store, record, name, attempt=attempt, rejected=["s03"])
    publish(folder, record, read_records(folder))
    finish(folder, {"forecast": {"hours": 1}, "actual": {"hours": 2}})
    return todo


def finished(store: ObjectStore, target: str = "t") -> tuple[RunFolder, RunRecord]:
    pointer, folder, record = opened(store, target)
    assert do_rest(folder, record) == SLICES
    pointer.close(folder)
    return folder, record


def left_behind(store: ObjectStore, run_id: str) -> RunFolder:
    """An unfinished run with one slice done, that no pointer names."""
    record = new_run(store, NAMES, run_id=run_id)
    finish_slice(store, record, SLICES[0])
    return RunFolder(store, run_id)


def keys(store: ObjectStore) -> set[str]:
    return {info.key for info in store.list_objects()}


def only(runs: list[ListedRun]) -> ListedRun:
    (run,) = runs
    return run


# ---- list and show


def test_the_newest_run_is_listed_first(store: LocalStore) -> None:
    ids = [opened(store, target)[1].run_id for target in "abc"]
    assert [run.run for run in list_runs(store).runs] == sorted(ids, reverse=True)


def test_a_run_with_a_damaged_record_is_named_and_hides_no_other(store: LocalStore) -> None:
    _, damaged, record = opened(store)
    finish_slice(store, record, SLICES[1])
    _, sound, _ = opened(store, "u")
    key = record_key(*read_records(damaged))
    store.put(key, store.get(key).data[:40])
    listed = list_runs(store)
    assert only(listed.runs).run == sound.run_id
    (unreadable,) = listed.unreadable
    assert (unreadable.run, unreadable.where) == (damaged.run_id, store.uri(key))
    with pytest.raises(DataError, match="damaged") as caught:
        read_records(damaged)
    assert "convoy runs repair" in str(caught.value.next_step)
    store.delete([key])
    assert do_rest(damaged, record, attempt="a1") == SLICES


def test_a_run_with_a_damaged_manifest_is_named(store: LocalStore) -> None:
    folder, _ = finished(store)
    store.put(folder.key("manifest.json"), b'{"run_id": "x", "slices": [{}]}')
    with pytest.raises(DataError, match=r"does not say what it should: slices\.0\.") as caught:
        show_run(store, folder.run_id)
    assert caught.value.where == store.uri(folder.key("manifest.json"))


def test_an_open_run_is_listed_with_what_is_done_of_it(store: LocalStore) -> None:
    _, folder, record = opened(store)
    finish_slice(store, record, SLICES[1], rejected=["s05"])
    listed = only(list_runs(store).runs)
    assert (listed.run, listed.verb, listed.state, listed.held_by) == (folder.run_id, "cache", "open", None)
    assert (listed.done, listed.inputs) == (4, 10)


def test_an_unfinished_training_tells_its_newest_checkpoint_of_all_steps(store: LocalStore) -> None:
    folder = OpenRun(store, verb="train", target="t").start()
    plan = {"batch_size": 16, "phases": [{"epochs": 1}, {"epochs": 3}]}
    record = RunRecord.new(
        folder.run_id,
        verb="train",
        identity={},
        config={},
        outputs={},
        groups=(),
        # Seven steps an epoch.
        settings={"setup": {"plan": plan}, "train": {"num_rows": 100}},
    )
    folder.write_record(record)

    def reached() -> list[tuple[int, int, int, int]]:
        found = [only(list_runs(store).runs).trained, show_run(store, folder.run_id).trained]
        return [(one.step, one.num_steps, one.epoch, one.num_epochs) for one in found if one is not None]

    assert reached() == [(0, 28, 0, 4)] * 2
    for step, epoch in ((3, 1), (7, 1), (8, 2), (28, 4)):
        CheckpointFolder(store, folder.run_id).write(step, b"weights", details={})
        assert reached() == [(step, 28, epoch, 4)] * 2
    finish(folder, {})
    assert reached() == []
    opened(store)
    assert [one.trained for one in list_runs(store).runs] == [None, None]


def test_two_attempts_of_a_slice_count_once(store: LocalStore) -> None:
    _, _, record = opened(store)
    for attempt in ("a", "b"):
        finish_slice(store, record, SLICES[1], attempt=attempt)
    assert only(list_runs(store).runs).done == 4


def test_a_held_run_names_its_driver(store: LocalStore) -> None:
    _, folder, _ = opened(store)
    with hold_run(folder):
        listed = only(list_runs(store).runs)
        assert listed.state is RunState.HELD
        assert "process " in str(listed.held_by)
    assert only(list_runs(store).runs).state is RunState.OPEN
    put_lease(folder)
    assert "process 1 on elsewhere since 2026-01-01" in str(only(list_runs(store).runs).held_by)


def test_states_follow_a_run_to_its_end(store: LocalStore) -> None:
    folder, _ = finished(store)
    listed = only(list_runs(store).runs)
    assert (listed.state, listed.done, listed.inputs) == (RunState.FINISHED, 10, 10)
    left_behind(store, OLD)
    give_up(left_behind(store, "20200102-000000-00000000"))
    states = {run.run: run.state for run in list_runs(store).runs}
    assert list(states.values()) == [RunState.FINISHED, RunState.GIVEN_UP, RunState.LEFT_BEHIND]
    assert next(iter(states)) == folder.run_id


def test_a_run_that_died_at_once_is_listed_too(store: LocalStore) -> None:
    folder = OpenRun(store, verb="cache", target="t").start()
    listed = only(list_runs(store).runs)
    assert (listed.run, listed.state, listed.done) == (folder.run_id, RunState.OPEN, None)
    with pytest.raises(DataError, match="died before"):
        show_run(store, folder.run_id)


def test_show_tells_the_progress_from_the_records_alone(store: LocalStore) -> None:
    _, folder, record = opened(store)
    finish_slice(store, record, SLICES[0], rejected=["s03"])
    with hold_run(folder):
        shown = show_run(store, folder.run_id)
    assert (shown.slices_done, shown.slices, shown.results, shown.rejects) == (1, 3, 3, 1)
    # The made slices take from second 1 to second 3.
    assert shown.images_per_s == 2
    assert shown.left_s == 3
    assert shown.identity == {"names": NAMES, "splits": "all"}
    assert shown.forecast is None


def test_show_puts_forecast_and_truth_side_by_side(store: LocalStore) -> None:
    folder, _ = finished(store)
    shown = show_run(store, folder.run_id)
    assert (shown.forecast, shown.actual) == ({"hours": 1}, {"hours": 2})
    assert (shown.state, shown.results, shown.rejects, shown.left_s) == (RunState.FINISHED, 9, 1, None)


def test_unknown_runs_are_refused(store: LocalStore) -> None:
    opened(store)
    for command in (show_run, cancel_run):
        for name in ("nope", "open"):
            with pytest.raises(ConfigError, match="no run"):
                command(store, name)


@pytest.mark.parametrize("below", ["records", "", "records/"])
def test_a_folder_below_a_run_is_no_run(store: LocalStore, below: str) -> None:
    _, folder, record = opened(store)
    finish_slice(store, record, SLICES[0])
    before = keys(store)
    for command in (cancel_run, show_run, verify_run):
        with pytest.raises(ConfigError, match="no run"):
            command(store, f"{folder.run_id}/{below}")
    assert keys(store) == before


def test_a_run_that_was_given_up_is_not_said_to_be_ended_by_a_command(store: LocalStore) -> None:
    _, folder, _ = opened(store)
    with pytest.raises(DataError, match="not finished") as caught:
        verify_run(store, folder.run_id)
    assert caught.value.next_step == "run the job's command again to finish it"
    cancel_run(store, folder.run_id)
    with pytest.raises(DataError, match="not finished") as caught:
        verify_run(store, folder.run_id)
    assert "it is given up" in caught.value.next_step


def test_pauses_between_attempts_do_not_slow_the_rate(store: LocalStore) -> None:
    _, _, record = opened(store)
    made = finish_slice(store, record, SLICES[0])

    def at(start_s: float, end_s: float) -> SliceRecord:
        return made.model_copy(update={"started_unix_s": start_s, "finished_unix_s": end_s})

    assert seconds_under_way([at(0, 10), at(5, 12), at(1000, 1004), at(1001, 1002)]) == 16
    assert seconds_under_way([]) == 0


def test_age_comes_from_the_record_or_the_id(store: LocalStore) -> None:
    assert opened_utc(OLD, None) == datetime(2020, 1, 1, tzinfo=UTC)
    assert opened_utc("sample", None) is None
    now = datetime.now(UTC)
    ages = [age_in_words(now - timedelta(seconds=seconds)) for seconds in (30, 300, 8000, 500_000)]
    assert ages == ["30 s", "5 min", "2 h", "6 days"]
    assert age_in_words(None) == ""


# ---- diff


def predicted_run(store: ObjectStore, run_id: str, classes: np.ndarray, **identity: str) -> None:
    """A published evaluation that predicted these classes of three."""
    folder = RunFolder(store, run_id)
    groups = freeze_input(folder, missing_rows([made_manifest(NAMES)], {PREDICTIONS: NOTHING}), slice_rows=5)
    record = RunRecord.new(
        run_id,
        verb="evaluate",
        identity={"dataset_fingerprint": "f", **identity},
        config={"crops": identity.get("model")},
        outputs={PREDICTIONS: folder.key(f"{PREDICTIONS}/")},
        groups=groups,
    )
    folder.write_record(record)
    logits_NK = np.eye(3, dtype=np.float32)[classes]
    for index, name in enumerate(record.slice_names()):
        rows = slice(5 * index, 5 * index + 5)
        table = predictions_table(
            folder.read_slice(name),
            labels=pa.nulls(5, pa.int32()),
            logits_BK=logits_NK[rows],
            scores_BK=logits_NK[rows],
            classes=["x", "y", "z"],
        )
        key = f"{record.outputs[PREDICTIONS]}part-{name}-a.parquet"
        part = write_predictions(store, key, table, model_digest="m", run_id=run_id, metadata={})
        made = slice_record(name, {PREDICTIONS: part}, num_results=5, run_id=run_id, attempt="a")
        write_record(store, made)
    publish(folder, record, read_records(folder))
    finish(folder, {})


def test_diff_counts_the_predictions_that_changed(store: LocalStore) -> None:
    classes = np.arange(10) % 3
    predicted_run(store, "a", classes, model="one")
    classes[[2, 7]] = 0
    predicted_run(store, "b", classes, model="two")
    diff = diff_runs(store, "a", "b")
    assert [(one.key, one.first, one.second) for one in diff.identity] == [("model", "one", "two")]
    assert [one.key for one in diff.config] == ["crops"]
    assert diff.versions == []
    assert diff.notes == []
    assert diff.predictions is not None
    assert (diff.predictions.rows_first, diff.predictions.pairs, diff.predictions.changed) == (10, 10, 2)
    assert diff.predictions.examples == [
        ChangedPrediction(sample_id="s02", first="z", second="x"),
        ChangedPrediction(sample_id="s07", first="y", second="x"),
    ]


def test_diff_of_runs_over_other_versions_says_so(store: LocalStore) -> None:
    predicted_run(store, "a", np.zeros(10, int))
    predicted_run(store, "b", np.zeros(10, int), dataset_fingerprint="g")
    diff = diff_runs(store, "a", "b")
    assert "different versions" in diff.notes[0]
    assert diff.predictions is not None
    assert diff.predictions.changed == 0


def test_diff_of_runs_without_predictions_has_none(store: LocalStore) -> None:
    one, _ = finished(store, "one")
    other, _ = finished(store, "other")
    diff = diff_runs(store, one.run_id, other.run_id)
    assert (diff.predictions, diff.identity, diff.verbs) == (None, [], ("cache", "cache"))


def test_a_run_that_goes_on_says_which_settings_it_keeps(
    store: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    _, folder, record = opened(store)
    for name in SLICES:
        finish_slice(store, record, name)
    extraction = ExtractionConfig(batch_size=4)
    begun = record.model_copy(update={"config": {"extraction": extraction.model_dump(mode="json")}})

    def go_on(told: ExtractionConfig) -> str:
        caplog.clear()
        with hold_run(folder) as lease:
            do_slices(
                folder,
                begun,
                lambda tasks, pool: iter(()),
                lease=lease,
                extraction=told,
                progress=Silent(),
                work=PlannedWork(record.num_inputs),
            )
        return caplog.text

    assert "with extraction.batch_size=4, not 2; --new-run takes" in go_on(ExtractionConfig(batch_size=2))
    assert go_on(extraction) == ""
    assert go_on(ExtractionConfig()) == "", "nothing else was asked for"


# ---- cancel


def test_a_cancelled_run_is_not_gone_on_with(store: LocalStore) -> None:
    pointer, folder, _ = opened(store)
    report = cancel_run(store, folder.run_id)
    assert (report.before, report.held_by) == (RunState.OPEN, None)
    assert pointer.current() is None
    assert only(list_runs(store).runs).state is RunState.GIVEN_UP
    with pytest.raises(RunCancelled), hold_run(folder):
        pass
    assert pointer.start().run_id != folder.run_id
    assert cancel_run(store, folder.run_id).before is RunState.GIVEN_UP


def test_a_live_driver_of_a_cancelled_run_stops(store: LocalStore) -> None:
    _, folder, _ = opened(store)
    with hold_run(folder) as lease:
        report = cancel_run(store, folder.run_id)
        assert report.before is RunState.HELD
        assert "stops at its next slice" in report.notes[0]
        with pytest.raises(RunCancelled):
            lease.confirm()


def test_a_run_that_publishes_while_it_is_given_up_is_not_given_up(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    pointer, folder, record = opened(store)
    parts = [finish_slice(store, record, name) for name in SLICES]

    def late(given_up: RunFolder) -> None:
        publish(folder, record, parts)
        give_up(given_up)

    monkeypatch.setattr("convoy.pipelines.runs_cancel.give_up", late)
    with pytest.raises(ConfigError, match="published"):
        cancel_run(store, folder.run_id)
    current = pointer.current()
    assert current is not None
    assert (current.run_id, is_given_up(folder)) == (folder.run_id, False)
    assert do_rest(folder, record) == []


def test_a_run_that_a_driver_is_at_is_not_left_behind(store: LocalStore) -> None:
    pointer, folder, record = opened(store)
    with hold_run(folder, ttl_s=1.5), pytest.raises(LeaseHeld, match=r"process .* on "):
        take_up(pointer, record.identity, new_run=True)
    current = pointer.current()
    assert current is not None
    assert current.run_id == folder.run_id
    with hold_run(folder, ttl_s=1.5):
        joined, _ = take_up(pointer, record.identity, new_run=True, when_held=WhenHeld.WAIT)
    assert joined is not None
    assert joined.run_id == folder.run_id
    assert take_up(pointer, record.identity, new_run=True) == (None, None)
    assert pointer.current() is None


def test_a_driver_that_died_elsewhere_keeps_no_run_from_being_left_behind(store: LocalStore) -> None:
    pointer, folder, record = opened(store)
    put_lease(folder, ttl_s=0.3)
    assert take_up(pointer, record.identity, new_run=True) == (None, None)


def test_a_damaged_lease_says_how_to_be_rid_of_it(store: LocalStore) -> None:
    _, folder, _ = opened(store)
    store.put(folder.key("lease.json"), b"{")
    with pytest.raises(DataError, match="damaged") as refused:
        cancel_run(store, folder.run_id)
    assert "no driver is at work" in (refused.value.next_step or "")
    store.delete([folder.key("lease.json")])
    assert cancel_run(store, folder.run_id).before is RunState.OPEN


def test_another_target_keeps_its_pointer(store: LocalStore) -> None:
    _, folder, _ = opened(store, "one")
    other, other_folder, _ = opened(store, "other")
    cancel_run(store, folder.run_id)
    current = other.current()
    assert current is not None
    assert current.run_id == other_folder.run_id


def test_published_results_cannot_be_given_up(store: LocalStore) -> None:
    folder, _ = finished(store)
    with pytest.raises(ConfigError, match="finished"):
        cancel_run(store, folder.run_id)
    store.delete([folder.key("_SUCCESS")])
    with pytest.raises(ConfigError, match="published"):
        cancel_run(store, folder.run_id)


# ---- repair


def flip_last_byte(store: LocalStore, key: str) -> None:
    """Bit rot: neither the size nor the time of the file tells of it."""
    path = Path(store.uri(key))
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def lose(store: LocalStore, key: str) -> None:
    store.delete([key])


@pytest.mark.parametrize("damage", [flip_last_byte, lose])
def test_a_damaged_slice_and_no_other_is_computed_again(
    store: LocalStore, damage: Callable[[LocalStore, str], None]
) -> None:
    folder, record = finished(store)
    clean = verify_run(store, folder.run_id)
    manifest = read_manifest(folder)
    assert manifest is not None
    damage(store, manifest.slices[1].parts[SET_ID].key)
    assert not verify_run(store, folder.run_id).ok

    before = keys(store)
    shown = repair_run(store, folder.run_id, Changes.SHOWN)
    assert [one.slice for one in shown.damaged] == [SLICES[1]]
    assert "--apply" in shown.left_to_do
    assert keys(store) == before

    made = repair_run(store, folder.run_id, Changes.MADE)
    assert (made.num_damaged, made.slices) == (1, 3)
    assert "convoy cache" in made.left_to_do
    assert open_pointers(store) == {folder.run_id: record.open_key}
    (commit,) = read_commits(store, SET_ID)
    assert len(commit.parts) == 2, "the sound rows stay visible"

    pointer = OpenRun(store, verb="cache", target="t")
    resumed, found = pointer.resume({"names": NAMES, "splits": "all"}, new_run=False)
    assert resumed is not None
    assert found is not None
    assert do_rest(resumed, found, attempt="a1") == [SLICES[1]]
    pointer.close(resumed)
    again = verify_run(store, folder.run_id)
    assert again.ok, again.problems
    assert again.rows_digest == clean.rows_digest
    assert repair_run(store, folder.run_id, Changes.SHOWN).left_to_do == "nothing"


def test_images_that_the_store_did_not_give_are_tried_again_on_request(store: LocalStore) -> None:
    pointer = OpenRun(store, verb="score", target="nightly")
    folder = pointer.start()
    record = new_run(
        store,
        NAMES,
        run_id=folder.run_id,
        open_key=folder.open_key,
        prefix=folder.key("scores/"),
        verb="score",
    )
    finish_slice(store, record, SLICES[1], rejected=["s05"], code=RejectCode.ACCESS_DENIED)
    assert do_rest(folder, record) == [SLICES[0], SLICES[2]]
    pointer.close(folder)
    before = keys(store)
    assert repair_run(store, folder.run_id, Changes.SHOWN).left_to_do == "nothing"

    shown = repair_run(store, folder.run_id, Changes.SHOWN, retry_unfetched=True)
    assert (shown.num_damaged, shown.retried_slices, shown.retried_images) == (0, 1, 1)
    assert "--retry-unfetched --apply" in shown.left_to_do
    assert keys(store) == before
    assert "convoy score" in repair_run(store, folder.run_id, Changes.MADE, retry_unfetched=True).left_to_do
    assert set(open_pointers(store)) == {folder.run_id}
    assert do_rest(folder, record, attempt="a1") == [SLICES[1]]
    again = verify_run(store, folder.run_id)
    assert again.ok, again.problems
    assert again.rejects == 1, "what decodes to nothing stays a reject"


def test_a_run_that_was_given_up_while_it_was_published_can_be_repaired_and_ended(store: LocalStore) -> None:
    folder, record = finished(store)
    give_up(folder)
    part = next(iter(read_records(folder)[0].parts.values()))
    store.put(part.key, b"damaged")
    assert repair_run(store, folder.run_id, Changes.MADE).num_damaged == 1
    do_rest(folder, record, attempt="a1")
    with hold_run(folder):
        pass
    assert verify_run(store, folder.run_id).ok


class CutOff(Exception):
    """What a kill is to the test: nothing is done any more."""


@contextmanager
def dying_at_change(number: int) -> Iterator[list[str]]:
    """Whoever changes a local store dies at the change of that number, counted from 0; yields what was done before."""
    done: list[str] = []

    def dying(name: str) -> Callable[..., Any]:
        whole = getattr(LocalStore, name)

        def change(store: LocalStore, *args: Any, **options: Any) -> Any:
            if len(done) == number:
                raise CutOff
            done.append(name)
            return whole(store, *args, **options)

        return change

    with pytest.MonkeyPatch.context() as patch, suppress(CutOff):
        for name in ("put", "put_if_absent", "put_if_match", "delete"):
            patch.setattr(LocalStore, name, dying(name))
        yield done


def ends(pointer: OpenRun, record: RunRecord) -> bool:
    """Whether a job's command goes on with the run of the pointer, which it ends then; else it was finished already."""
    folder, _ = take_up(pointer, record.identity, new_run=False)
    if folder is None:
        return False
    do_rest(folder, record, attempt="a1")
    pointer.close(folder)
    return True


def test_a_repair_that_is_killed_anywhere_leaves_no_run_that_ends_with_its_damage(tmp_path: Path) -> None:
    by_command = 0
    for number in itertools.count():
        store = LocalStore(str(tmp_path / str(number)))
        pointer, folder, record = opened(store)
        do_rest(folder, record)
        pointer.close(folder)
        lost, rotten = (one.parts[SET_ID].key for one in read_records(folder)[:2])
        lose(store, lost)
        flip_last_byte(store, rotten)
        with dying_at_change(number) as done:
            repair_run(store, folder.run_id, Changes.MADE)
        # This process holds it and lives on.
        store.delete([folder.key("lease.json")])
        if ends(pointer, record):
            by_command += 1
        else:
            repair_run(store, folder.run_id, Changes.MADE)
            assert ends(pointer, record)
        assert verify_run(store, folder.run_id).ok, f"killed after {done}"
        if len(done) < number:
            break
    assert number > 10
    assert 0 < by_command < number


def test_a_repair_of_whole_slices_that_is_killed_anywhere_leaves_a_whole_run_or_one_to_repair(
    tmp_path: Path,
) -> None:
    cut_off = 0
    for number in itertools.count():
        store = LocalStore(str(tmp_path / str(number)))
        pointer, folder, record = opened(store, verb=SCORE)
        missing = finish_slice(store, record, SLICES[0], rejected=["s01"], code=RejectCode.GONE)
        assert missing.unfetched == 1
        do_rest(folder, record)
        pointer.close(folder)
        with dying_at_change(number) as done:
            repair_run(store, folder.run_id, Changes.MADE, retry_unfetched=True)
        store.delete([folder.key("lease.json")])
        if not ends(pointer, record) and read_manifest(folder) is None:
            cut_off += 1
            with pytest.raises(DataError, match="not finished") as caught:
                verify_run(store, folder.run_id)
            assert f"convoy runs repair {folder.run_id} --apply" in caught.value.next_step
            repair_run(store, folder.run_id, Changes.MADE)
            assert ends(pointer, record)
        assert verify_run(store, folder.run_id).ok, f"killed after {done}"
        if len(done) < number:
            break
    assert number > 5
    assert cut_off == 1


def test_rejects_of_features_need_no_repair(store: LocalStore) -> None:
    folder, _ = finished(store)
    with pytest.raises(ConfigError, match="next job that needs them"):
        repair_run(store, folder.run_id, Changes.SHOWN, retry_unfetched=True)


def test_repair_removes_only_files_that_belong_to_nothing(store: LocalStore) -> None:
    folder, record = finished(store)
    orphan = f"{record.outputs[SET_ID]}part-0-000000-dead.parquet"
    store.put(orphan, b"of a worker that was killed")
    store.put(folder.key("rejects/0-000000-dead.parquet"), b"as well")
    before = keys(store)
    shown = repair_run(store, folder.run_id, Changes.SHOWN)
    assert (shown.num_orphans, shown.num_damaged) == (2, 0)
    assert orphan in shown.orphans
    assert keys(store) == before
    repair_run(store, folder.run_id, Changes.MADE)
    assert before - keys(store) == {orphan, folder.key("rejects/0-000000-dead.parquet")}
    assert verify_run(store, folder.run_id).ok


def test_records_that_were_lost_come_back_from_the_manifest(store: LocalStore) -> None:
    folder, record = finished(store)
    manifest = read_manifest(folder)
    assert manifest is not None
    store.delete([record_key(manifest.slices[0])])
    lose(store, manifest.slices[1].parts[SET_ID].key)
    repair_run(store, folder.run_id, Changes.MADE)
    assert do_rest(folder, record, attempt="a1") == [SLICES[1]]


def test_a_record_that_cannot_be_read_is_removed_and_its_slice_computed_again(store: LocalStore) -> None:
    _, folder, record = opened(store)
    attempt = finish_slice(store, record, SLICES[0])
    finish_slice(store, record, SLICES[1])
    store.put(record_key(attempt), b"{")
    shown = repair_run(store, folder.run_id, Changes.SHOWN)
    assert record_key(attempt) in shown.orphans
    assert store.get(record_key(attempt)).data == b"{"
    repair_run(store, folder.run_id, Changes.MADE)
    assert do_rest(folder, record, attempt="a1") == [SLICES[0], SLICES[2]]
    assert verify_run(store, folder.run_id).ok


def test_a_record_of_another_convoy_is_left_where_it_is(store: LocalStore) -> None:
    _, folder, record = opened(store)
    finish_slice(store, record, SLICES[0])
    key = record_key(read_records(folder)[0])
    store.put(key, b'{"of": "tomorrow"}')
    with pytest.raises(DataError) as caught:
        repair_run(store, folder.run_id, Changes.MADE)
    assert "upgrade Convoy" in caught.value.next_step
    assert store.get(key).data == b'{"of": "tomorrow"}'


def test_a_record_that_cannot_be_read_comes_back_from_the_manifest(store: LocalStore) -> None:
    folder, record = finished(store)
    manifest = read_manifest(folder)
    assert manifest is not None
    store.put(record_key(manifest.slices[0]), b"")
    lose(store, manifest.slices[1].parts[SET_ID].key)
    repair_run(store, folder.run_id, Changes.MADE)
    assert do_rest(folder, record, attempt="a1") == [SLICES[1]]


def test_a_damaged_attempt_of_an_unfinished_run_is_forgotten(store: LocalStore) -> None:
    _, folder, record = opened(store)
    for name in SLICES[:2]:
        finish_slice(store, record, name)
    attempt = read_records(folder)[0]
    flip_last_byte(store, attempt.parts[SET_ID].key)
    assert attempt.slice in choose_attempts(folder, record, read_records(folder)), (
        "a listing cannot see bit rot"
    )
    assert repair_run(store, folder.run_id, Changes.MADE).num_damaged == 1
    assert sorted(choose_attempts(folder, record, read_records(folder))) == [SLICES[1]]


def test_repair_leaves_a_run_alone_that_a_driver_is_at(store: LocalStore) -> None:
    _, folder, record = opened(store)
    finish_slice(store, record, SLICES[0])
    store.put(f"{record.outputs[SET_ID]}part-0-000001-b.parquet", b"being written")
    before = keys(store)
    with hold_run(folder, ttl_s=1.5), pytest.raises(LeaseHeld):
        repair_run(store, folder.run_id, Changes.MADE)
    assert keys(store) - {folder.key("lease.json")} == before


def test_repair_does_not_push_another_run_of_the_job_aside(store: LocalStore) -> None:
    folder, _ = finished(store)
    manifest = read_manifest(folder)
    assert manifest is not None
    lose(store, manifest.slices[1].parts[SET_ID].key)
    _, other, _ = opened(store)
    with pytest.raises(ConfigError, match="in the way"):
        repair_run(store, folder.run_id, Changes.MADE)
    assert folder.is_finished()
    assert other.run_id in open_pointers(store)


def test_results_of_a_dataset_version_that_was_refreshed_are_not_taken_back(
    store: LocalStore, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    write_files(source, "cat/0.jpg", "dog/0.jpg")
    version = freeze_dataset(store, "pets", str(source))
    identity = {"dataset": "pets", "dataset_fingerprint": version.header.fingerprint}
    folder = OpenRun(store, verb="evaluate", target="nightly").start()
    record = new_run(
        store,
        NAMES,
        run_id=folder.run_id,
        open_key=folder.open_key,
        identity=identity,
        prefix=folder.key("scores/"),
        verb="evaluate",
    )
    do_rest(folder, record)
    store.delete([folder.open_key])
    lose(store, read_records(folder)[1].parts[SET_ID].key)
    write_files(source, "cat/1.jpg")
    freeze_dataset(store, "pets", str(source))

    with pytest.raises(DataError, match="no command would finish this run again"):
        repair_run(store, folder.run_id, Changes.MADE)
    assert folder.is_finished()
    assert read_manifest(folder) is not None
    assert open_pointers(store) == {}

    (source / "cat/1.jpg").unlink()
    freeze_dataset(store, "pets", str(source))
    repair_run(store, folder.run_id, Changes.MADE)
    assert set(open_pointers(store)) == {folder.run_id}


def test_a_slice_without_its_input_cannot_be_repaired(store: LocalStore) -> None:
    folder, _ = finished(store)
    (shard,) = store.list_objects(folder.key(INPUT))
    store.put(shard.key, b"no parquet")
    assert repair_run(store, folder.run_id, Changes.SHOWN).num_damaged == 3
    with pytest.raises(DataError, match="frozen input is damaged too"):
        repair_run(store, folder.run_id, Changes.MADE)
    assert folder.is_finished()


# ---- gc


def gc(store: ObjectStore, changes: Changes = Changes.MADE, *, older_than_days: float = 7) -> GcReport:
    return collect_garbage(store, changes, older_than_days=older_than_days, watch_s=0.1)


def test_what_a_given_up_run_left_goes_and_nothing_else(store: LocalStore) -> None:
    finished(store, "finished")
    _, held, record = opened(store, "open")
    finish_slice(store, record, SLICES[0])
    kept = keys(store)
    _, folder, record = opened(store, "cancelled")
    finish_slice(store, record, SLICES[0], rejected=["s03"])
    cancel_run(store, folder.run_id)
    # The pointer that is empty now.
    kept.add(folder.open_key)
    left = keys(store) - kept
    assert any(key.startswith("features/") for key in left)

    shown = gc(store, Changes.SHOWN)
    assert [(one.what, one.files) for one in shown.garbage] == [(folder.run_id, len(left))]
    assert keys(store) == kept | left
    assert gc(store).files == len(left)
    assert keys(store) == kept
    assert gc(store).garbage == []
    assert held.run_id in open_pointers(store)


def test_runs_left_behind_go_when_they_are_old(store: LocalStore) -> None:
    record = left_behind(store, OLD).record()
    assert record is not None
    pointer, young, _ = opened(store)
    pointer.close(young)
    report = gc(store)
    # Their records say that both are of today.
    assert report.garbage == []
    assert {kept.run for kept in report.kept} == {OLD, young.run_id}
    document = json.loads(store.get(f"runs/{OLD}/run.json").data)
    document["created_utc"] = "2020-01-01T00:00:00+00:00"
    store.put(f"runs/{OLD}/run.json", json.dumps(document).encode())
    assert [one.what for one in gc(store).garbage] == [OLD]
    assert not any(OLD in key for key in keys(store))
    assert [one.what for one in gc(store, older_than_days=0).garbage] == [young.run_id]


def test_a_run_that_died_before_its_record_is_dated_by_its_id(store: LocalStore) -> None:
    store.put(f"runs/{OLD}/input/0-00000.parquet", b"half of it")
    store.put("runs/unheard-of/input/0-00000.parquet", b"half of it")
    report = gc(store)
    assert [one.what for one in report.garbage] == [OLD]
    assert [one.run for one in report.kept] == ["unheard-of"]


def test_a_run_that_a_commit_or_an_answer_names_stays(store: LocalStore) -> None:
    folder, _ = finished(store)
    manifest = read_manifest(folder)
    assert manifest is not None
    lose(store, manifest.slices[1].parts[SET_ID].key)
    repair_run(store, folder.run_id, Changes.MADE)
    cancel_run(store, folder.run_id)
    answer = left_behind(store, OLD)
    give_up(answer)
    store.put("predictions/d.json", json.dumps({"run_id": OLD}).encode())
    before = keys(store)
    report = gc(store, older_than_days=0)
    assert report.garbage == []
    assert {kept.run for kept in report.kept} == {folder.run_id, OLD}
    assert keys(store) == before


def test_what_dry_runs_said_is_no_answer_that_names_a_run(store: LocalStore) -> None:
    forecast = f"{FORECASTS}d.json"
    store.put(forecast, b'{"images": 96}')
    give_up(left_behind(store, OLD))
    assert [one.what for one in gc(store).garbage] == [OLD]
    assert keys(store) == {forecast}


def test_a_run_that_a_driver_is_still_at_stays(store: LocalStore) -> None:
    folder = left_behind(store, OLD)
    with hold_run(folder, ttl_s=1.0):
        give_up(folder)
        report = gc(store)
        assert (report.garbage, [kept.run for kept in report.kept]) == ([], [OLD])
    put_lease(folder, ttl_s=0.3)
    assert [one.what for one in gc(store).garbage] == [OLD]


def test_a_run_that_ends_while_leases_are_watched_stays(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    pointer, folder, record = opened(store)
    parts = [finish_slice(store, record, name) for name in SLICES]
    give_up(folder)
    pointer.close(folder)

    def ending(folders: object) -> set[str]:
        publish(folder, record, parts)
        finish(folder, {})
        return set()

    monkeypatch.setattr("convoy.pipelines.runs_gc.living_holders", ending)
    report = gc(store, older_than_days=0)
    assert report.garbage == []
    assert [(kept.run, kept.why) for kept in report.kept] == [(folder.run_id, "it has ended in the meantime")]
    assert verify_run(store, folder.run_id).ok


def test_checkpoints_and_what_ray_train_wrote_go_once_their_training_is_finished(store: LocalStore) -> None:
    done, _ = finished(store, "finished")
    _, unfinished, _ = opened(store, "open")
    kept = keys(store)
    checkpoints = [CheckpointFolder(store, folder.run_id) for folder in (done, unfinished)]
    needed = [folder.write(1, b"weights", details={}) for folder in checkpoints][1]
    markers = [folder.key("ray_train/start/.validate_storage_marker") for folder in (done, unfinished)]
    for marker in markers:
        store.put(marker, b"")
    report = gc(store)
    assert [(one.what, one.files) for one in report.garbage] == [(done.run_id, 3)]
    assert keys(store) == kept | {needed.key, needed.record_key, markers[1]}


def test_leftovers_of_a_killed_probe_go(store: LocalStore) -> None:
    store.put(f"{PROBE_FOLDER}abc/0", b"writer 3")
    assert gc(store, Changes.SHOWN).files == 1
    assert gc(store).files == 1
    assert keys(store) == set()


def test_half_of_files_whose_writers_were_killed_go_after_a_day(store: LocalStore) -> None:
    store.put("models/one", b"whole")
    store.put_if_match("models/one", b"whole too", etag=store.head("models/one").etag)
    folder = Path(store.root, "models")
    lock = folder / LOCK_NAME
    old, young = (folder / f"{PRIVATE_PREFIX}{name}" for name in ("old", "young"))
    for path in (lock, old, young):
        path.write_bytes(b"half")
    for path in (lock, old):
        os.utime(path, (0, 0))
    assert gc(store, Changes.SHOWN).size_bytes == 4
    assert old.exists()
    assert gc(store).files == 1
    assert (old.exists(), young.exists(), lock.exists(), keys(store)) == (False, True, True, {"models/one"})
    assert gc(store).files == 0


@pytest.mark.parametrize("verb", ["train", "tune"])
def test_a_run_without_rows_of_its_own_is_not_called_unfinished(store: ObjectStore, verb: str) -> None:
    folder = OpenRun(store, verb=verb, target="t").start()
    folder.write_record(
        RunRecord.new(folder.run_id, verb=verb, identity={}, config={}, outputs={}, groups=())
    )
    finish(folder, {})
    with pytest.raises(ConfigError, match=f"convoy {verb} has no rows of results"):
        verify_run(store, folder.run_id)
