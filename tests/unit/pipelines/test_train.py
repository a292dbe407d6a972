"""What a training is measured on, which is known before it begins."""

from __future__ import annotations

from pathlib import Path

import pytest

from convoy.core.config import parse_config
from convoy.core.errors import ConfigError, DataError
from convoy.core.progress import Silent
from convoy.core.records import Split
from convoy.pipelines import train, train_plan
from convoy.pipelines.train import measured_on, run_train
from convoy.pipelines.train_config import TrainConfig
from convoy.pipelines.train_plan import plan_train
from convoy.pipelines.training_rows import Fold, RowLimit
from convoy.storage.manifests import Manifest
from made_advice_rows import frozen_rows

CLASSES = ("good", "defect")
SETTINGS = {"name": "parts", "dataset": "parts", "backbone": {"arch": "resnet18"}}
CONFIG = parse_config(TrainConfig, SETTINGS, where="here")


def manifest_of(folder: Path, *splits: Split, unlabelled: tuple[Split, ...] = ()) -> Manifest:
    rows = dict.fromkeys((Split.TRAIN, *splits), (10, 10))
    return frozen_rows(folder, rows, CLASSES, unlabelled=unlabelled)


def test_a_model_is_measured_on_test_or_on_val_where_test_has_no_labels(tmp_path: Path) -> None:
    both = manifest_of(tmp_path / "both", Split.TEST, Split.VAL)
    assert measured_on(both, CONFIG) == (Split.TEST, None)
    mute = manifest_of(tmp_path / "mute", Split.TEST, Split.VAL, unlabelled=(Split.TEST,))
    assert measured_on(mute, CONFIG) == (Split.VAL, None)


def test_a_fold_is_measured_on_unless_the_caller_wants_a_split(tmp_path: Path) -> None:
    fold = Fold(index=0, count=5)
    config = CONFIG.model_copy(update={"rows": RowLimit(fold=fold)})
    assert measured_on(manifest_of(tmp_path / "bare"), config) == (Split.TRAIN, fold)
    whole = manifest_of(tmp_path / "whole", Split.VAL)
    assert measured_on(whole, config, Split.VAL) == (Split.VAL, None)


@pytest.mark.parametrize("splits", [(), (Split.TEST,), (Split.TEST, Split.VAL)])
def test_where_nothing_could_be_measured_nothing_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, splits: tuple[Split, ...]
) -> None:
    manifest = manifest_of(tmp_path, *splits, unlabelled=splits)
    monkeypatch.setattr(train, "open_dataset", lambda *_: manifest)
    monkeypatch.setattr(train, "_train", lambda job: pytest.fail("it was trained"))
    config = CONFIG.model_copy(update={"workspace": str(tmp_path)})
    with pytest.raises(DataError, match="neither test nor val") as caught:
        run_train(config, progress=Silent(), draw_curves=lambda *_: b"")
    assert "rows.fold" in str(caught.value.next_step)


def test_several_values_of_c_without_rows_to_choose_by_are_refused_before_any_feature_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = manifest_of(tmp_path, Split.TEST)
    for module in (train, train_plan):
        monkeypatch.setattr(module, "open_dataset", lambda *_: manifest)
    monkeypatch.setattr(train, "_train", lambda job: pytest.fail("it was trained"))
    config = CONFIG.model_copy(update={"workspace": str(tmp_path)})
    with pytest.raises(ConfigError, match="7 values of C and no validation rows"):
        run_train(config, progress=Silent(), draw_curves=lambda *_: b"")
    with pytest.raises(ConfigError, match="7 values of C and no validation rows"):
        plan_train(config)
    fold = RowLimit(fold=Fold(index=0, count=5))
    assert plan_train(config.model_copy(update={"rows": fold})).num_train_rows == 16
