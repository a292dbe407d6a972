from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from convoy.core.errors import DataError
from convoy.pipelines.runs_repair import repair_run
from convoy.pipelines.runs_state import Changes
from convoy.pipelines.verify import verify_run
from convoy.storage.commits import RunManifest, finish, publish, read_records
from convoy.storage.local_store import LocalStore
from convoy.storage.manifests import fingerprint_samples
from convoy.storage.runs import OpenRun, RunFolder, RunRecord
from made_manifests import write_samples
from made_runs import SET_ID, finish_slice, made_manifest, new_run

NAMES = [f"s{index:02d}" for index in range(10)]
CLASSES = ("a", "b", "c")


def finished(store: LocalStore, run: RunRecord | None = None) -> RunManifest:
    run = run or new_run(store, NAMES)
    folder = RunFolder(store, run.run_id)
    for name in run.slice_names():
        finish_slice(store, run, name, rejected=["s03"])
    manifest = publish(folder, run, read_records(folder))
    finish(folder, {})
    return manifest


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path))


def test_finished_run_is_proven(store: LocalStore) -> None:
    manifest = finished(store)
    report = verify_run(store, "r1")
    assert (report.inputs, report.results, report.rejects, report.ok) == (10, 9, 1, True)
    assert report.rows_digest == manifest.rows_digest()


def flip_last_byte(store: LocalStore, key: str) -> None:
    data = bytearray(store.get(key).data)
    data[-1] ^= 1
    store.put(key, bytes(data))


def swap_with_other_part(store: LocalStore, key: str) -> None:
    other = key.replace("0-000001", "0-000000")
    store.put(key, store.get(other).data)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip_last_byte, "not those that were written"),
        (swap_with_other_part, "not those that were written"),
        (lambda store, key: store.delete([key]), "slice 0-000001"),
    ],
)
def test_damaged_part_is_named(
    store: LocalStore, damage: Callable[[LocalStore, str], None], words: str
) -> None:
    manifest = finished(store)
    damage(store, manifest.slices[1].parts[SET_ID].key)
    report = verify_run(store, "r1")
    assert not report.ok
    assert words in report.problems[0]


def test_lost_reject_is_noticed(store: LocalStore) -> None:
    manifest = finished(store)
    rejects = manifest.slices[0].rejects
    assert rejects is not None
    store.delete([rejects.key])
    assert not verify_run(store, "r1").ok


def test_row_in_results_and_rejects_is_noticed(store: LocalStore) -> None:
    run = new_run(store, NAMES)
    folder = RunFolder(store, run.run_id)
    records = [finish_slice(store, run, name, rejected=["s03"]) for name in run.slice_names()]
    doubled = finish_slice(store, run, "0-000000", attempt="b")
    records[0] = records[0].model_copy(update={"parts": doubled.parts})
    publish(folder, run, records)
    finish(folder, {})
    problems = verify_run(store, "r1").problems
    assert any("are not the slice's 4 inputs" in problem for problem in problems)


def test_commit_that_lists_other_parts_is_noticed(store: LocalStore) -> None:
    finished(store)
    store.delete([f"features/{SET_ID}/commits/r1.json"])
    assert "lists other parts" in verify_run(store, "r1").problems[0]


@pytest.mark.parametrize("folder", [f"features/{SET_ID}/run=r1/", "runs/r1/rejects/"])
def test_a_file_of_an_attempt_that_does_not_count_is_named(store: LocalStore, folder: str) -> None:
    """Of a worker that hung until its run was published, and was killed before it took its file back."""
    late = f"{folder}part-0-000000-late.parquet"
    store.put(late, store.get(finished(store).slices[0].parts[SET_ID].key).data)
    (problem,) = verify_run(store, "r1").problems
    assert problem.startswith(late)
    assert "convoy runs repair r1" in problem
    repair_run(store, "r1", Changes.MADE)
    assert verify_run(store, "r1").ok


def evaluation(store: LocalStore, frozen: Sequence[str], *, splits: Any = "all") -> RunRecord:
    """An evaluation of a dataset of NAMES, of whose rows these were frozen."""
    samples = made_manifest(NAMES)
    fingerprint = fingerprint_samples(samples, CLASSES)
    write_samples(store, samples, CLASSES, key=f"datasets/letters/versions/{fingerprint}/manifest.parquet")
    identity = {"dataset": "letters", "dataset_fingerprint": fingerprint, "splits": splits}
    return new_run(store, frozen, identity=identity, prefix="runs/r1/predictions/", verb="evaluate")


@pytest.mark.parametrize("splits", ["all", ["train"]])
def test_an_evaluation_of_all_rows_of_its_dataset_is_proven(store: LocalStore, splits: Any) -> None:
    finished(store, evaluation(store, NAMES, splits=splits))
    report = verify_run(store, "r1")
    assert (report.ok, report.notes) == (True, [])


@pytest.mark.parametrize("frozen", [NAMES[:-1], [*NAMES, NAMES[0]], [*NAMES[:-1], NAMES[0]]])
def test_a_row_that_was_lost_or_doubled_in_freezing_is_noticed(store: LocalStore, frozen: list[str]) -> None:
    finished(store, evaluation(store, frozen))
    (problem,) = verify_run(store, "r1").problems
    assert f"the ids of the run's {len(frozen)} inputs are not those of version" in problem


def test_a_dataset_that_is_gone_is_noted(store: LocalStore) -> None:
    finished(store, evaluation(store, NAMES))
    store.delete([info.key for info in store.list_objects("datasets/")])
    report = verify_run(store, "r1")
    assert report.ok
    assert "could not be compared with its dataset: dataset 'letters' has no version" in report.notes[0]


def test_run_without_marker_is_not_ok(store: LocalStore) -> None:
    finished(store)
    store.delete(["runs/r1/_SUCCESS"])
    assert "_SUCCESS" in verify_run(store, "r1").problems[0]


def test_unfinished_run_says_how_to_finish_it(store: LocalStore) -> None:
    folder = OpenRun(store, verb="cache", target="t").start()
    new_run(store, NAMES, run_id=folder.run_id, open_key=folder.open_key)
    with pytest.raises(DataError, match="run the job's command again"):
        verify_run(store, folder.run_id)


def test_unfinished_run_that_no_command_goes_on_with_says_so(store: LocalStore) -> None:
    new_run(store, NAMES)
    with pytest.raises(DataError, match="no command goes on with it, as it is left behind"):
        verify_run(store, "r1")
