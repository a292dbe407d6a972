"""Verification of advice: rows choose or judge, never both, and what cannot be verified is refused early."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from convoy.core.config import load_config
from convoy.core.errors import DataError
from convoy.core.progress import Silent
from convoy.core.records import Split
from convoy.pipelines import advise_verify
from convoy.pipelines.advise_config import AdviseConfig, VerifySettings
from convoy.pipelines.advise_strategies import Option, train_config
from convoy.pipelines.advise_verify import Verifier, at_budget, chosen_options
from convoy.pipelines.advise_work import AdviceWork
from convoy.pipelines.classifiers import Strategy
from convoy.pipelines.train_config import TrainConfig
from convoy.pipelines.training_rows import validation_rows
from convoy.pipelines.wanted_training import wanted_recipe
from convoy.storage.local_store import LocalStore
from convoy.storage.manifests import Manifest
from convoy.storage.runs import RunFolder
from made_advice import interval, made_strategy
from made_advice_rows import frozen_rows

CONFIG = load_config(AdviseConfig, None, ["candidates=[{backbone: {arch: resnet18}}]", "dataset=parts"])


def made_verifier(manifest: Manifest, folder: RunFolder) -> Verifier:
    return Verifier(
        manifest,
        CONFIG,
        VerifySettings(),
        folder,
        progress=Silent(),
        draw_curves=lambda *_: b"",
        new_run=False,
    )


def made_option(strategy: Strategy, **settings: object) -> Option:
    base = {
        "name": "parts-x",
        "dataset": "parts",
        "strategy": strategy.value,
        "backbone": {"arch": "resnet18"},
    }
    made = made_strategy(1, strategy, 0.5, 1.0)
    return Option(
        strategy=strategy,
        backbone=made.backbone,
        tap=None,
        top1=interval(0.5),
        cost=made.cost,
        basis=made.basis,
        settings=base | ({"tap": "pooled"} if strategy is Strategy.LINEAR_PROBE else {}) | settings,
        why="",
    )


def verified_config(strategy: Strategy, settings: VerifySettings) -> TrainConfig:
    made = at_budget(made_option(strategy), CONFIG, settings, num_rows=32, fold_judges=False)
    return train_config(made, where="here")[0]


@pytest.mark.parametrize("averaging", ["best", "soup", "ema"])
@pytest.mark.parametrize("fold_judges", [True, False])
def test_rows_that_judge_choose_no_epoch(averaging: str, fold_judges: bool) -> None:
    recipe = {"averaging": averaging, "patience_epochs": 2, "batch_size": 16}
    option = made_option(Strategy.FINE_TUNE, recipe=recipe)
    settings = at_budget(option, CONFIG, VerifySettings(epochs=3), num_rows=32, fold_judges=fold_judges)
    found = train_config(settings, where="here")[0].recipe
    assert found.batch_size == 16
    if fold_judges:
        assert (found.averaging, found.patience_epochs) == ("ema" if averaging == "ema" else "last", None)
    else:
        assert (found.averaging, found.patience_epochs) == (averaging, 2)


@pytest.mark.parametrize(
    ("strategy", "recipe", "batch_size"),
    [
        (Strategy.FINE_TUNE, {"batch_size": 32}, 28),
        (Strategy.FINE_TUNE, {"batch_size": 16}, 16),
        (Strategy.FROM_SCRATCH, {"label_smoothing": 0.1}, 28),
    ],
)
def test_batches_are_no_larger_than_the_budget(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    strategy: Strategy,
    recipe: dict[str, object],
    batch_size: int,
) -> None:
    """A fifth of 35 images judges; the paper's batch of a ResNet is of 256."""
    planned = []

    def train(training: TrainConfig, **_: object) -> SimpleNamespace:
        planned.append(wanted_recipe(training))
        return SimpleNamespace(intervals={"top1_wilson": interval(0.5)}, bundle="parts-x@1", run="")

    monkeypatch.setattr(advise_verify, "run_train", train)
    verifier = made_verifier(
        frozen_rows(tmp_path, {Split.TRAIN: (18, 17)}, ("good", "defect")),
        RunFolder(LocalStore(str(tmp_path)), "r1"),
    )
    option = made_option(strategy, recipe=recipe)
    verifier.verify([made_strategy(1, strategy, 0.5, 1.0)], [option], check=lambda: None)
    assert [one.batch_size for one in planned] == [batch_size]
    assert planned[0].label_smoothing == recipe.get("label_smoothing", 0.0)


@pytest.mark.parametrize("strategy", [Strategy.LINEAR_PROBE, Strategy.FINE_TUNE])
def test_training_rows_choose_what_val_judges(tmp_path: Path, strategy: Strategy) -> None:
    manifest = frozen_rows(tmp_path, {Split.TRAIN: (40, 40), Split.VAL: (30, 30)}, ("good", "defect"))
    config = verified_config(strategy, VerifySettings(images_per_class=20, epochs=3))
    choosing = validation_rows(manifest, config.rows)
    assert choosing is not None
    assert set(choosing["split"].to_pylist()) == {"train"}
    assert choosing.num_rows == 8
    assert config.rows.max_per_class == 20
    assert (config.epochs == 3) is (strategy is Strategy.FINE_TUNE)


def test_a_class_that_no_fold_can_hold_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    manifest = frozen_rows(tmp_path, {Split.TRAIN: (40, 1), Split.VAL: (30, 30)}, ("good", "defect"))
    folder = RunFolder(LocalStore(str(tmp_path)), "r1")
    with pytest.raises(DataError, match="class defect has one training image"):
        made_verifier(manifest, folder)


@pytest.mark.parametrize("new_run", [True, False])
def test_new_run_leaves_unfinished_trainings_behind_and_repeats_none_that_was_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_run: bool
) -> None:
    begun = []

    def train(training: TrainConfig, *, new_run: bool, **given: object) -> SimpleNamespace:
        begun.append((training.name, new_run))
        return SimpleNamespace(intervals={"top1_wilson": interval(0.5)}, bundle="parts-x@1", run="")

    monkeypatch.setattr(advise_verify, "run_train", train)
    store = LocalStore(str(tmp_path))
    work = AdviceWork(
        store=store,
        manifest=frozen_rows(tmp_path, {Split.TRAIN: (40, 40), Split.VAL: (30, 30)}, ("good", "defect")),
        config=CONFIG.model_copy(update={"verify": VerifySettings()}),
        folder=RunFolder(store, "r1"),
        progress=Silent(),
        draw_curves=lambda *_: b"",
        check=lambda: None,
        new_run=new_run,
    )
    strategy = Strategy.FINE_TUNE
    for _ in range(2):
        verifier = work._verifier()
        assert verifier is not None
        verifier.verify([made_strategy(1, strategy, 0.5, 1.0)], [made_option(strategy)], check=lambda: None)
    assert begun == [("parts-x-verify", new_run)]


def test_what_was_verified_has_the_rank_and_the_expectation_of_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed advice that goes on measures its costs anew, and strategies within a tie change places."""
    monkeypatch.setattr(
        advise_verify,
        "run_train",
        lambda *_, **__: SimpleNamespace(intervals={"top1_wilson": interval(0.5)}, bundle="b@1", run=""),
    )
    verifier = made_verifier(
        frozen_rows(tmp_path, {Split.TRAIN: (40, 40), Split.VAL: (30, 30)}, ("good", "defect")),
        RunFolder(LocalStore(str(tmp_path)), "r1"),
    )
    order = [Strategy.LINEAR_PROBE, Strategy.FINE_TUNE]
    found = [
        made.model_copy(update={"settings": made.settings | {"name": made.strategy.value}})
        for made in map(made_option, order)
    ]
    for top1, strategies in ((0.5, order), (0.6, order[::-1])):
        ranked = [made_strategy(rank, one, top1, 1.0) for rank, one in enumerate(strategies, start=1)]
        runs = verifier.verify(ranked, found, check=lambda: None).runs
        assert [(one.strategy, one.rank) for one in runs] == [(strategies[0], 1), (strategies[1], 2)]
        assert {one.expected_top1 for one in runs} == {top1}


def test_every_strategy_is_run_once_on_its_best_backbone_before_further_backbones() -> None:
    order = [
        Strategy.LINEAR_PROBE,
        Strategy.LINEAR_PROBE,
        Strategy.FINE_TUNE,
        Strategy.FINE_TUNE,
        Strategy.FROM_SCRATCH,
    ]
    ranked = [made_strategy(rank, strategy, 0.5, 1.0) for rank, strategy in enumerate(order, start=1)]
    ranks = {limit: [one.rank for one in chosen_options(ranked, limit)] for limit in (None, 2, 4, 9)}
    assert ranks == {None: [1, 3, 5], 2: [1, 3], 4: [1, 3, 5, 2], 9: [1, 3, 5, 2, 4]}
