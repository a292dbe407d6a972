"""What an evaluation keeps of its confusions."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from convoy.core.errors import DataError
from convoy.core.fingerprints import canonical_json
from convoy.core.records import Split
from convoy.pipelines.evaluation import Evaluation, require_labels
from made_pages import made_evaluation


def test_an_evaluation_of_many_classes_grows_with_its_rows_and_not_with_the_square_of_its_classes() -> None:
    classes = tuple(f"class {number}" for number in range(2000))
    evaluation = made_evaluation(classes, num_rows=500)
    text = canonical_json(evaluation)
    assert len(text) < 1_000_000
    assert Evaluation.model_validate_json(text) == evaluation
    assert evaluation.confusion is None
    assert sum(num_rows for *_, num_rows in evaluation.confused()) == 500


def test_the_confusions_of_a_matrix_are_its_entries_above_0() -> None:
    evaluation = made_evaluation(("cat", "dog", "owl"), num_rows=400)
    assert evaluation.confusion is not None
    assert evaluation.confusion_entries is None
    found = {(label, pred): num_rows for label, pred, num_rows in evaluation.confused()}
    for label, row in enumerate(evaluation.confusion):
        for pred, num_rows in enumerate(row):
            assert found.get((label, pred), 0) == num_rows
    assert 0 not in found.values()


def test_what_a_split_that_is_not_there_would_be_measured_on_is_refused() -> None:
    counts = {Split.TRAIN: SimpleNamespace(by_class=[3]), Split.VAL: SimpleNamespace(by_class=[2])}
    manifest = SimpleNamespace(counts=counts, uri="datasets/pets")
    require_labels(manifest, [Split.VAL])  # type: ignore[arg-type]
    with pytest.raises(DataError, match="there is no split test"):
        require_labels(manifest, [Split.VAL, Split.TEST])  # type: ignore[arg-type]
