"""The journal of a search: what was drawn, what ended, and that each trial has one record for good."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from convoy.cluster.search_plan import GivenUp
from convoy.core.config import parse_config
from convoy.core.errors import DataError
from convoy.core.fingerprints import canonical_json
from convoy.core.trial_events import TrialState
from convoy.pipelines.folds import _of_fold
from convoy.pipelines.training_rows import Fold
from convoy.pipelines.trial_journal import TrialCost, TrialJournal, TrialRecord, trials_parquet
from convoy.pipelines.tune_config import TuneConfig
from convoy.storage.local_store import LocalStore
from convoy.storage.runs import RunFolder

CONFIG = {
    "name": "search",
    "dataset": "digits",
    "base": {"backbone": {"arch": "lenet5", "weights": "random"}, "strategy": "from_scratch"},
    "space": {"recipe.seed": {"grid": [0, 1, 2]}},
}


@pytest.fixture
def journal(tmp_path: Path) -> TrialJournal:
    folder = RunFolder(LocalStore(str(tmp_path)), "run-1")
    return TrialJournal(folder, parse_config(TuneConfig, CONFIG, where="test"))


def record(journal: TrialJournal, index: int, **fields: Any) -> TrialRecord:
    point = journal.point(index, {"recipe.seed": index})
    values: dict[str, Any] = {
        "config": {},
        "state": TrialState.FINISHED,
        "top1": 0.5,
        "started_unix_s": 10.0 * index,
        "finished_unix_s": 10.0 * index + 8,
    }
    return TrialRecord(**point.model_dump(), **{**values, **fields})


def test_what_was_drawn_and_has_no_record_is_waiting(journal: TrialJournal) -> None:
    points = [journal.point(index, {"recipe.seed": index}) for index in range(3)]
    for point in reversed(points):
        journal.drawn(point)
        journal.drawn(point)
    journal.write(record(journal, 1))
    assert [one.index for one in journal.records()] == [1]
    assert journal.waiting(journal.records()) == [points[0], points[2]]
    assert journal.ended(points[0]) is None
    ended = journal.ended(points[1])
    assert ended is not None
    assert (ended.state, ended.top1, ended.seconds) == (TrialState.FINISHED, 0.5, 8.0)


def test_the_first_record_of_a_trial_counts(journal: TrialJournal) -> None:
    first = journal.write(record(journal, 0))
    assert journal.write(record(journal, 0, state=TrialState.FAILED, top1=None)) == first
    assert journal.records() == [first]


def test_a_record_from_before_rejects_were_recorded_is_read(journal: TrialJournal) -> None:
    former = record(journal, 0).model_dump(mode="json", exclude={"rejects", "within_error_budget"})
    journal._store.put(journal._folder.key(f"trials/{former['trial']}.json"), canonical_json(former))
    (read,) = journal.records()
    assert (read.rejects, read.within_error_budget) == (0, True)


@pytest.mark.parametrize("data", [b"{", b'{"trial": "000-abcdef", "invented": 1}'])
def test_a_record_that_is_damaged_or_of_a_newer_convoy_is_named(journal: TrialJournal, data: bytes) -> None:
    key = journal._folder.key("trials/000-abcdef.json")
    journal._store.put(key, data)
    for read in (journal.records, lambda: journal.record("000-abcdef")):
        with pytest.raises(DataError, match=r"damaged|does not say what it should") as caught:
            read()
        assert caught.value.where == journal._store.uri(key)


def test_names_differ_between_searches_and_points(journal: TrialJournal, tmp_path: Path) -> None:
    other = TrialJournal(RunFolder(LocalStore(str(tmp_path)), "run-2"), journal._config)
    points = [
        journal.point(0, {"a": 1}),
        journal.point(0, {"a": 2}),
        journal.point(1, {"a": 1}),
        other.point(0, {"a": 1}),
    ]
    assert len({point.trial for point in points}) == 4
    assert journal.point(0, {"a": 1}) == points[0]
    assert journal.train_config(journal.point(0, {"recipe.seed": 2})).recipe.seed == 2


def test_a_trial_has_the_trainings_that_it_runs(journal: TrialJournal) -> None:
    point = journal.point(0, {"recipe.seed": 0})
    training = journal.train_config(point)
    assert journal.trainings(point.trial) == [training.name]
    folds = TrialJournal(journal._folder, journal._config.model_copy(update={"folds": 2}))
    trained = [_of_fold(training, Fold(index=index, count=2))[0].name for index in range(2)]
    assert folds.trainings(point.trial) == trained


def test_a_trial_that_was_given_up_says_why_and_how_far_it_was(journal: TrialJournal) -> None:
    point = journal.point(0, {"recipe.seed": 0})
    end = GivenUp(state=TrialState.STOPPED, reason="too slow", epochs=((1, 0.2), (2, 0.4)), seconds=30)
    journal.give_up(point, end)
    (kept,) = journal.records()
    assert (kept.state, kept.reason, kept.top1) == (TrialState.STOPPED, "too slow", 0.4)
    assert kept.finished_unix_s - kept.started_unix_s == pytest.approx(30)
    assert kept.past.epochs == ((1, 0.2), (2, 0.4))
    assert kept.status.epoch == 2


def test_trials_are_a_table_of_plain_types(journal: TrialJournal) -> None:
    cost = TrialCost(parameters=10, macs=20, size_bytes=30, num_views=2, images_per_s=None, cluster_share=0.5)
    failed = record(journal, 1, state=TrialState.FAILED, top1=None, reason="no number")
    finished = record(journal, 0, cost=cost, rejects=2)
    table = pq.read_table(io.BytesIO(trials_parquet([finished, failed]))).to_pylist()
    assert [row["state"] for row in table] == ["finished", "failed"]
    assert [row["macs"] for row in table] == [20, None]
    assert [row["cluster_share"] for row in table] == [0.5, None]
    assert table[0]["values"] == '{"recipe.seed":0}'
    assert table[1]["reason"] == "no number"
    assert table[0]["seconds"] == 8.0
    assert [(row["rejects"], row["within_error_budget"]) for row in table] == [(2, True), (0, True)]
