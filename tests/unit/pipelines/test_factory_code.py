"""A factory whose code has changed makes another network: no job goes on, or answers, with what the former one did."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cache_jobs import write_digits
from convoy.core.config import parse_config
from convoy.core.errors import VersionMismatch
from convoy.core.progress import Silent
from convoy.core.splits import SplitOptions
from convoy.pipelines import advise, folds, retrain, train
from convoy.pipelines.advise_config import AdviseConfig
from convoy.pipelines.feature_plan import FeatureRequest, plan_sets
from convoy.pipelines.models import fetch_backbone
from convoy.pipelines.network_training import config_identity
from convoy.pipelines.retrain_config import RetrainConfig
from convoy.pipelines.search_identity import search_identity
from convoy.pipelines.train_config import TrainConfig
from convoy.pipelines.train_plan import plan_train
from convoy.pipelines.tune_config import TuneConfig
from convoy.storage.datasets import freeze_dataset, open_dataset
from convoy.storage.local_store import LocalStore
from convoy.vision.backbone_config import BackboneConfig
from made_bundles import FP32
from made_factories import ARCH, write_factory

BACKBONE = {"arch": ARCH, "weights": "random", "preset": {"resize_px": 32, "crop_px": 32}}
Change = Callable[..., None]


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    write_digits(tmp_path / "images", 60)
    store = LocalStore(str(tmp_path / "workspace"))
    freeze_dataset(store, "digits", str(tmp_path / "images"), splits=SplitOptions(val_fraction=0.3))
    return store


@pytest.fixture
def change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Change:
    """Writes the factory's module anew."""
    return lambda **code: write_factory(tmp_path / "code", monkeypatch, **code)


def training(store: LocalStore, **settings: Any) -> TrainConfig:
    given = {"workspace": store.root_uri, "name": "digits", "dataset": "digits", "backbone": BACKBONE}
    return parse_config(TrainConfig, {**given, "strategy": "from_scratch", **settings}, where="test")


def test_features_of_other_code_are_another_set_though_the_weights_are_the_same(
    store: LocalStore, change: Change
) -> None:
    config = BackboneConfig.model_validate(BACKBONE)
    records, sets = [], []
    for activation in ("ReLU", "GELU"):
        change(activation=activation)
        records.append(fetch_backbone(store, config))
        sets += plan_sets(records[-1], FeatureRequest(dataset="digits", backbone=config), FP32)
    assert records[0].weights_digest == records[1].weights_digest
    assert sets[0].set_id != sets[1].set_id


def test_a_training_from_scratch_begins_with_weights_of_the_width_of_now(
    store: LocalStore, change: Change
) -> None:
    for width in (4, 6):
        change(width=width)
        plan = plan_train(training(store, epochs=1, recipe={"batch_size": 8}))
        assert plan.stages[0].channels == width


def test_a_training_by_other_code_is_another_training(
    store: LocalStore, change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[TrainConfig] = []

    def begin(job: train._Job) -> Any:
        begun.append(job.config)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "_run", begin)
    for activation in ("ReLU", "GELU"):
        change(activation=activation)
        with pytest.raises(KeyboardInterrupt):
            train.run_train(training(store, strategy="as_is"), progress=Silent(), draw_curves=lambda *_: b"")
    one, other = (config_identity(config) for config in begun)
    assert one != other
    # A driver that is told which code it must be refuses another copy.
    change(activation="Tanh")
    with pytest.raises(VersionMismatch):
        train.run_train(begun[0], progress=Silent(), draw_curves=lambda *_: b"")


def test_folds_that_other_code_has_trained_are_trained_anew(
    store: LocalStore, change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def known(_: LocalStore, key: str) -> Any:
        asked.append(key)
        raise KeyboardInterrupt

    monkeypatch.setattr(folds, "_known", known)
    for activation in ("ReLU", "GELU"):
        change(activation=activation)
        with pytest.raises(KeyboardInterrupt):
            folds.train_folds(
                training(store, strategy="linear_probe"), 2, progress=Silent(), draw_curves=lambda *_: b""
            )
    assert asked[0] != asked[1]


def test_a_search_over_other_code_is_another_search(store: LocalStore, change: Change) -> None:
    settings = {
        "workspace": store.root_uri,
        "name": "search",
        "dataset": "digits",
        "base": {"strategy": "from_scratch"},
        "space": {"backbone": {"grid": [BACKBONE, {"arch": "lenet5", "weights": "random"}]}},
    }
    config = parse_config(TuneConfig, settings, where="test")
    identities = []
    for activation in ("ReLU", "GELU"):
        change(activation=activation)
        identities.append(search_identity(open_dataset(store, "digits"), config))
    assert list(identities[0]["code_digests"]) == [ARCH]
    assert identities[0] != identities[1]
    settings["space"] = {"backbone.seed": {"grid": [0, 1]}}
    settings["base"] = {"backbone": {"arch": "lenet5", "weights": "random"}, "strategy": "from_scratch"}
    plain = search_identity(open_dataset(store, "digits"), parse_config(TuneConfig, settings, where="test"))
    assert plain.keys() == {"dataset_fingerprint", "config"}


def test_advice_on_other_code_is_other_advice(
    store: LocalStore, change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def known(_: LocalStore, pointer: str, __: AdviseConfig) -> Any:
        asked.append(pointer)
        raise KeyboardInterrupt

    monkeypatch.setattr(advise, "_known", known)
    settings = {"workspace": store.root_uri, "dataset": "digits", "candidates": [{"backbone": BACKBONE}]}
    config = parse_config(AdviseConfig, settings, where="test")
    for activation in ("ReLU", "GELU"):
        change(activation=activation)
        with pytest.raises(KeyboardInterrupt):
            advise.run_advise(config, progress=Silent(), draw_curves=lambda *_: b"")
    assert asked[0] != asked[1]


def test_a_date_of_a_retraining_is_decided_about_the_code_of_its_backbone(
    store: LocalStore, change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[RetrainConfig] = []

    def begin(_: Any, __: Any, config: RetrainConfig, *___: Any) -> Any:
        begun.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr(retrain, "_retrain", begin)
    settings = {"workspace": store.root_uri, "name": "digits", "dataset": "digits", "backbone": BACKBONE}
    for activation in ("ReLU", "GELU"):
        change(activation=activation)
        with pytest.raises(KeyboardInterrupt):
            retrain.run_retrain(
                parse_config(RetrainConfig, settings, where="test"),
                progress=Silent(),
                draw_curves=lambda *_: b"",
            )
    assert begun[0].backbone != begun[1].backbone
