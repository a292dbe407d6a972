from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from convoy.cluster.training_loop import TrainingWorker
from convoy.cluster.training_results import TrainingOutcome
from convoy.storage.local_store import LocalStore
from convoy.storage.teacher_logits import read_teacher_logits, write_teacher_logits
from convoy.vision.augmentation_policy import AugmentationPolicy
from convoy.vision.training_config import Distillation, Phase
from made_training import GroupOfOne, digit_rows, recipe, store_teacher, training_spec

# 240 training rows, and 60 for validation.
NUM_IMAGES = 300


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    return digit_rows(tmp_path_factory.mktemp("digits"), NUM_IMAGES)


def trained(workspace: Path, rows: pa.Table, **settings: Any) -> TrainingOutcome:
    fields = {
        "phases": (Phase(name="train", epochs=16, learning_rate=0.02),),
        "recipe": recipe(batch_size=16),
        "batch_size": 16,
        "checkpoint_steps": 1000,
        "augmentation": AugmentationPolicy(),
    }
    return TrainingWorker(training_spec(workspace, rows, **{**fields, **settings}), GroupOfOne(), None).run()


def with_shuffled_train_labels(rows: pa.Table) -> pa.Table:
    """The labels of the training rows (four of five) moved among each other."""
    labels_N = rows["label"].to_numpy().copy()
    is_train_N = np.arange(len(labels_N)) % 5 != 4
    labels_N[is_train_N] = np.random.default_rng(0).permutation(labels_N[is_train_N])
    field = rows.schema.field("label")
    return rows.set_column(rows.schema.get_field_index("label"), field, pa.array(labels_N, field.type))


def test_what_the_teacher_says_arrives_at_its_images(tmp_path: Path, rows: pa.Table) -> None:
    """Labels that mean nothing, and a teacher that knows better: only from it can the student learn."""
    true_N = rows["label"].to_numpy()[np.arange(NUM_IMAGES) % 5 != 4]
    logits_NK = (8.0 * np.eye(10)[true_N]).astype(np.float16)
    shuffled = with_shuffled_train_labels(rows)
    teacher = store_teacher(
        LocalStore(str(tmp_path / "taught")), logits_NK, Distillation(temperature=2, weight=1)
    )
    taught = trained(tmp_path / "taught", shuffled, teacher=teacher)
    alone = trained(tmp_path / "alone", shuffled)
    assert taught.val_top1 is not None
    assert alone.val_top1 is not None
    assert taught.val_top1 > 0.7
    assert alone.val_top1 < 0.3


def test_frozen_logits_are_read_back_in_their_order(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    logits_NK = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float16)
    write_teacher_logits(store, "teacher.parquet", [f"s{row}" for row in range(7)], logits_NK)
    np.testing.assert_array_equal(read_teacher_logits(store, "teacher.parquet"), logits_NK)
