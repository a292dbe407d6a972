"""The sample of an inspection: counts are of the images of the splits alone, and lost ones that were named are told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from convoy.core.records import Split
from convoy.pipelines.inspect_config import InspectConfig
from convoy.pipelines.inspect_sample import SampleReading
from convoy.storage.local_store import LocalStore
from made_advice_rows import frozen_rows
from made_bundles import made_classifier

CLASSES = ("a", "b")
NAMED = tuple(f"train/{label}/{index:03d}" for label in (0, 1) for index in range(30))


@pytest.fixture
def reading(tmp_path: Path) -> SampleReading:
    """Sixty training images are named beside the twenty of `test`."""
    manifest = frozen_rows(tmp_path, {Split.TRAIN: (60, 60), Split.TEST: (10, 10)}, CLASSES)
    store = LocalStore(str(tmp_path))
    config = InspectConfig.model_validate(
        {"bundle": "m", "dataset": "parts", "sample": {"num_images": 20, "sample_ids": NAMED}}
    )
    return SampleReading(store, manifest, made_classifier(store, 0, classes=CLASSES), config)


def test_named_images_of_another_split_are_shown_and_not_counted(reading: SampleReading) -> None:
    """The model has learnt them by heart, and is wrong on every test image."""
    rows = reading.rows()
    is_train_N = np.array(rows["split"].to_pylist()) == "train"
    labels_N = rows["label"].to_numpy()
    logits_NK = np.eye(2, dtype=np.float32)[np.where(is_train_N, labels_N, 1 - labels_N)]
    found_N = np.ones(rows.num_rows, np.bool_)
    found_N[np.flatnonzero(is_train_N)[:4]] = found_N[np.flatnonzero(~is_train_N)[0]] = False
    sample = reading.sample(rows, logits_NK[found_N], found_N)
    assert sample.top1 is not None
    assert sample.top1.estimate == 0
    assert (sample.is_counted_N.sum(), sample.num_rejects) == (19, 1)
    assert len(sample.shown(12, NAMED)) == 56


def test_classes_count_by_their_shares_and_not_by_those_of_the_sample(tmp_path: Path) -> None:
    """Ten of each class are looked at; the model knows all images of the rare class, and half of the others."""
    manifest = frozen_rows(tmp_path, {Split.TRAIN: (9, 9), Split.TEST: (380, 20)}, CLASSES)
    store = LocalStore(str(tmp_path))
    settings = {"bundle": "m", "dataset": "parts", "sample": {"num_images": 20}}
    config = InspectConfig.model_validate(settings)
    reading = SampleReading(store, manifest, made_classifier(store, 0, classes=CLASSES), config)
    rows = reading.rows()
    labels_N = rows["label"].to_numpy()
    assert np.bincount(labels_N).tolist() == [10, 10]
    predicted_N = labels_N.copy()
    predicted_N[np.flatnonzero(labels_N == 0)[:5]] = 1
    sample = reading.sample(rows, np.eye(2, dtype=np.float32)[predicted_N], np.ones(20, np.bool_))
    assert sample.top1 is not None
    assert sample.top1.estimate == pytest.approx(0.95 * 0.5 + 0.05)
    assert sample.top1.low < 0.3
    assert sample.top1.high > 0.75


def test_a_sample_without_labels_has_no_top1(tmp_path: Path) -> None:
    manifest = frozen_rows(
        tmp_path, {Split.TRAIN: (9, 9), Split.TEST: (10, 10)}, CLASSES, unlabelled=(Split.TEST,)
    )
    store = LocalStore(str(tmp_path))
    config = InspectConfig.model_validate({"bundle": "m", "dataset": "parts"})
    reading = SampleReading(store, manifest, made_classifier(store, 0, classes=CLASSES), config)
    rows = reading.rows()
    logits_NK = np.zeros((rows.num_rows, 2), np.float32)
    assert reading.sample(rows, logits_NK, np.ones(rows.num_rows, np.bool_)).top1 is None


def test_named_images_that_cannot_be_used_are_said(reading: SampleReading) -> None:
    rows = reading.rows()
    found_N = np.ones(rows.num_rows, np.bool_)
    assert reading.notes(rows, found_N) == []
    found_N[[0, 2, rows.num_rows - 1]] = False
    assert reading.notes(rows, found_N) == [
        "2 of 60 named images cannot be used and are not shown: train/0/000, train/0/002"
    ]
