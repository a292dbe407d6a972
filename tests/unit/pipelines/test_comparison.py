from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from convoy.core.errors import DataError
from convoy.core.fingerprints import canonical_json
from convoy.core.statistics import bootstrap_difference, mcnemar_test, paired_rate_difference
from convoy.pipelines.comparison import PredictedRun, compare_runs, top1_difference
from convoy.storage.commits import RunManifest, SliceRecord, part_key
from convoy.storage.local_store import LocalStore
from convoy.storage.predictions import PREDICTIONS, predictions_table, write_predictions
from convoy.storage.runs import RunFolder, RunRecord, SliceGroup, slice_name
from made_runs import slice_record

PETS = ("cat", "dog", "owl")
# The same classes in another order, and one that the other model does not know.
MORE_PETS = ("owl", "yak", "cat", "dog")

# By sample id: the label, and the probabilities of the classes.
Rows = Mapping[str, tuple[str | None, Sequence[float]]]
FIRST: Rows = {
    "a": ("cat", [0.7, 0.2, 0.1]),
    "b": ("dog", [0.6, 0.3, 0.1]),
    "c": ("owl", [0.1, 0.1, 0.8]),
    "d": ("cat", [0.2, 0.5, 0.3]),
    "rejected by the second": ("dog", [0.1, 0.8, 0.1]),
    "unlabelled": (None, [0.4, 0.3, 0.3]),
}
SECOND: Rows = {
    "unlabelled": (None, [0.1, 0.1, 0.7, 0.1]),
    "d": ("cat", [0.1, 0.1, 0.2, 0.6]),
    "rejected by the first": ("cat", [0.1, 0.1, 0.7, 0.1]),
    "b": ("dog", [0.1, 0.1, 0.2, 0.6]),
    "also rejected by the first": ("dog", [0.1, 0.1, 0.7, 0.1]),
    "a": ("cat", [0.2, 0.1, 0.5, 0.2]),
    "c": ("owl", [0.1, 0.6, 0.2, 0.1]),
}
# Rows a, b, c, d.
FIRST_CORRECT = np.array([True, False, True, False])
SECOND_CORRECT = np.array([True, True, False, False])
FIRST_NLL = -np.log([0.7, 0.3, 0.8, 0.2])
SECOND_NLL = -np.log([0.5, 0.6, 0.1, 0.2])


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path))


def predicted(
    store: LocalStore,
    run_id: str,
    classes: Sequence[str],
    rows: Rows,
    *,
    slice_rows: int = 4,
    fingerprint: str = "f" * 32,
    gives_probabilities: bool = True,
) -> PredictedRun:
    """A published run with these predictions, in slices."""
    names = list(rows)
    slices = [names[start : start + slice_rows] for start in range(0, len(names), slice_rows)]
    record = RunRecord.new(
        run_id,
        verb="evaluate",
        identity={"dataset_fingerprint": fingerprint, "splits": ["test"], "model_digest": run_id},
        config={},
        outputs={PREDICTIONS: f"runs/{run_id}/{PREDICTIONS}/"},
        groups=(SliceGroup(outputs=(PREDICTIONS,), num_rows=len(names), num_slices=len(slices)),),
    )
    folder = RunFolder(store, run_id)
    folder.write_record(record)
    records = tuple(
        finished_slice(store, record, slice_name(0, number), classes, {name: rows[name] for name in members})
        for number, members in enumerate(slices)
    )
    store.put(folder.key("manifest.json"), canonical_json(RunManifest(run_id=run_id, slices=records)))
    return PredictedRun(run=run_id, classes=classes, gives_probabilities=gives_probabilities)


def finished_slice(
    store: LocalStore, run: RunRecord, name: str, classes: Sequence[str], rows: Rows
) -> SliceRecord:
    probabilities_BK = np.array([probabilities for _, probabilities in rows.values()], np.float32)
    labels = [None if label is None else classes.index(label) for label, _ in rows.values()]
    table = predictions_table(
        pa.table({column: list(rows) for column in ("sample_id", "uri", "etag")}),
        labels=pa.array(labels, pa.int32()),
        logits_BK=np.log(probabilities_BK),
        scores_BK=probabilities_BK,
        classes=classes,
    )
    key = part_key(run.outputs[PREDICTIONS], name, "a0")
    part = write_predictions(store, key, table, model_digest="m", run_id=run.run_id, metadata={})
    return slice_record(name, {PREDICTIONS: part}, num_results=len(rows), run_id=run.run_id)


def test_labelled_rows_of_both_runs_are_paired_by_id_and_classes_by_name(store: LocalStore) -> None:
    first = predicted(store, "r1", PETS, FIRST)
    second = predicted(store, "r2", MORE_PETS, SECOND, slice_rows=3)
    found = compare_runs(store, first, second)
    assert (found.pairs, found.only_first, found.only_second) == (4, 1, 2)
    assert found.top1 == (FIRST_CORRECT.mean(), SECOND_CORRECT.mean())
    # Both say cat of row a and dog of row d, right or wrong; they differ on b and c.
    assert found.agreement == 0.5
    assert found.top1_difference == paired_rate_difference(FIRST_CORRECT, SECOND_CORRECT)
    assert found.mcnemar == mcnemar_test(FIRST_CORRECT, SECOND_CORRECT)
    assert (found.mcnemar.only_first_correct, found.mcnemar.only_second_correct) == (1, 1)


def test_nlls_are_those_of_the_pairs_and_differ_with_an_interval(store: LocalStore) -> None:
    found = compare_runs(
        store, predicted(store, "r1", PETS, FIRST), predicted(store, "r2", MORE_PETS, SECOND)
    )
    assert found.nll == pytest.approx((FIRST_NLL.mean(), SECOND_NLL.mean()), rel=1e-6)
    assert found.nll_difference is not None
    expected = bootstrap_difference(FIRST_NLL, SECOND_NLL)
    for name in ("estimate", "low", "high"):
        assert getattr(found.nll_difference, name) == pytest.approx(getattr(expected, name), rel=1e-5)


def test_the_other_order_turns_the_difference_around(store: LocalStore) -> None:
    first, second = predicted(store, "r1", PETS, FIRST), predicted(store, "r2", MORE_PETS, SECOND)
    forth, back = compare_runs(store, first, second), compare_runs(store, second, first)
    assert (back.pairs, back.only_first, back.only_second) == (4, 2, 1)
    assert back.top1 == forth.top1[::-1]
    assert forth.nll_difference is not None
    assert back.nll_difference is not None
    assert math.isclose(back.nll_difference.estimate, -forth.nll_difference.estimate)
    assert back.agreement == forth.agreement


def test_scores_that_are_no_probabilities_are_not_compared_as_such(store: LocalStore) -> None:
    first = predicted(store, "r1", PETS, FIRST)
    margins = predicted(store, "r2", MORE_PETS, SECOND, gives_probabilities=False)
    found = compare_runs(store, first, margins)
    assert (found.nll, found.nll_difference) == (None, None)
    assert found.top1 == (0.5, 0.5)


def test_a_model_does_not_differ_from_itself(store: LocalStore) -> None:
    first, again = predicted(store, "r1", PETS, FIRST), predicted(store, "r2", PETS, FIRST, slice_rows=1)
    found = compare_runs(store, first, again)
    assert (found.pairs, found.agreement, found.mcnemar.mid_p) == (5, 1.0, 1.0)
    # Five rows show no more than that.
    assert found.top1_difference.estimate == 0
    assert found.top1_difference.low == -found.top1_difference.high < 0


def test_runs_over_other_rows_are_refused(store: LocalStore) -> None:
    first = predicted(store, "r1", PETS, FIRST)
    refreshed = predicted(store, "r2", MORE_PETS, SECOND, fingerprint="e" * 32)
    with pytest.raises(DataError, match="not measured on the same rows"):
        compare_runs(store, first, refreshed)


def test_runs_without_a_common_row_are_refused(store: LocalStore) -> None:
    first = predicted(store, "r1", PETS, {name: FIRST[name] for name in ("a", "unlabelled")})
    second = predicted(store, "r2", MORE_PETS, {name: SECOND[name] for name in ("b", "unlabelled")})
    with pytest.raises(DataError, match="no labelled row was predicted by both"):
        compare_runs(store, first, second)


def test_a_run_that_was_never_published_is_refused(store: LocalStore) -> None:
    first, second = predicted(store, "r1", PETS, FIRST), predicted(store, "r2", PETS, FIRST)
    store.delete([RunFolder(store, "r2").key("manifest.json")])
    with pytest.raises(DataError, match="no published predictions"):
        compare_runs(store, first, second)


def test_the_top1_of_two_runs_differs_on_the_rows_of_both_whatever_their_classes(store: LocalStore) -> None:
    predicted(store, "r1", PETS, FIRST)
    predicted(store, "r2", MORE_PETS, SECOND, slice_rows=3)
    predicted(store, "r3", PETS, {"elsewhere": ("cat", [0.7, 0.2, 0.1])})
    assert top1_difference(store, "r1", "r2") == paired_rate_difference(FIRST_CORRECT, SECOND_CORRECT)
    assert top1_difference(store, "r1", "r3") is None
