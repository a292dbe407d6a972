"""Probes are judged by rows that are there: labelled ones, which could be read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from convoy.core.errors import DataError
from convoy.core.records import Split
from convoy.pipelines.probe_judging import ProbeBench, ProbeRows, best_by_other_half
from convoy.pipelines.training_rows import RowLimit
from convoy.storage.commits import publish, read_records
from convoy.storage.feature_cache import FeatureCache
from convoy.storage.local_store import LocalStore
from convoy.storage.runs import RunFolder
from convoy.vision.head_config import HeadConfig
from made_advice_rows import frozen_rows
from made_runs import SET_ID, finish_slice, new_run

COUNTS: dict[Split, tuple[int, ...]] = {Split.TRAIN: (40, 40), Split.VAL: (30, 30)}
CLASSES = ("good", "defect")


def test_a_fold_judges_probes_where_val_has_no_labels(tmp_path: Path) -> None:
    rows = ProbeRows.of(frozen_rows(tmp_path, COUNTS, CLASSES, unlabelled=(Split.VAL,)), RowLimit())
    assert rows.limit.fold is not None
    assert len(rows.judged.labels_N) == 16


@pytest.mark.parametrize(("of_val", "least_judged"), [((3, 2), 50), ((60, 0), 50), ((40, 20), 61)])
def test_a_fold_judges_probes_where_val_has_too_few_rows_or_one_class(
    tmp_path: Path, of_val: tuple[int, ...], least_judged: int
) -> None:
    manifest = frozen_rows(tmp_path, COUNTS | {Split.VAL: of_val}, CLASSES)
    rows = ProbeRows.of(manifest, RowLimit(), least_judged=least_judged)
    assert set(rows.judged_table["split"].to_pylist()) == {"train"}


def test_of_many_rows_some_judge_and_classes_keep_their_shares(tmp_path: Path) -> None:
    manifest = frozen_rows(tmp_path, {Split.TRAIN: (10, 10), Split.VAL: (90, 30)}, CLASSES)
    rows = ProbeRows.of(manifest, RowLimit(), max_judged=20)
    assert sorted(rows.judged.labels_N.tolist()) == [0] * 15 + [1] * 5
    assert rows.table.num_rows == 40
    assert len(ProbeRows.of(manifest, RowLimit(), max_judged=200).judged) == 120


def test_a_probe_that_no_image_judges_is_refused(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    rows = ProbeRows.of(frozen_rows(tmp_path, COUNTS, CLASSES), RowLimit())
    names = rows.table["sample_id"].to_pylist()
    record = new_run(store, names, slice_rows=len(names))
    finish_slice(store, record, "0-000000", rejected=[name for name in names if name.startswith("val/")])
    publish(RunFolder(store, record.run_id), record, read_records(RunFolder(store, record.run_id)))
    bench = ProbeBench(FeatureCache(store), rows, HeadConfig(C=(1.0,)), num_classes=2)
    with pytest.raises(DataError, match="none of 60 images that judge could be read"):
        bench.fit([SET_ID], SET_ID)


def test_the_best_of_many_guessers_is_no_better_than_chance_on_the_other_half() -> None:
    found, flattered = [], []
    for seed in range(40):
        correct_TM = np.random.default_rng(seed).random((8, 60)) < 0.5
        found.append(best_by_other_half(correct_TM, np.ones(60)).mean())
        flattered.append(correct_TM.mean(axis=1).max())
    assert abs(np.mean(found) - 0.5) < 0.03
    assert np.mean(flattered) > 0.57


def test_a_probe_that_is_better_is_found_by_either_half() -> None:
    random = np.random.default_rng(0)
    correct_TM = random.random((4, 400)) < np.array([0.5, 0.9, 0.6, 0.5])[:, None]
    np.testing.assert_array_equal(best_by_other_half(correct_TM, np.ones(400)), correct_TM[1])


def test_rows_choose_by_what_they_weigh_and_the_last_of_equals_is_taken() -> None:
    correct_TM = np.array([[1, 1, 0, 0, 1, 1], [0, 0, 1, 1, 0, 0]], np.bool_)
    heavy_M = np.array([1.0, 1.0, 9.0, 9.0, 1.0, 1.0])
    np.testing.assert_array_equal(best_by_other_half(correct_TM, heavy_M), correct_TM[1])
    np.testing.assert_array_equal(best_by_other_half(correct_TM, np.ones(6)), correct_TM[0])
    same_TM = np.array([[1, 0, 0, 1], [0, 1, 1, 0]], np.bool_)
    np.testing.assert_array_equal(best_by_other_half(same_TM, np.ones(4)), same_TM[1])
    np.testing.assert_array_equal(best_by_other_half(same_TM[:, :1], np.ones(1)), same_TM[1, :1])
