"""What a trial with a training a fold records, without the trainings and predictions of its folds."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cache_jobs import write_digits
from convoy.core.config import parse_config
from convoy.core.crop_policies import CropPlan, CropPolicy, crop_views
from convoy.core.progress import Silent
from convoy.core.splits import SplitOptions
from convoy.core.training_events import EpochResult
from convoy.pipelines import folds, trial_outcomes
from convoy.pipelines.folds import FoldModel, OutOfFold, train_folds
from convoy.pipelines.train import TrainReport
from convoy.pipelines.train_config import TrainConfig
from convoy.pipelines.training_rows import Fold
from convoy.pipelines.trial_outcomes import TrialSetting, outcome_of_folds, outcome_of_training
from convoy.storage.datasets import freeze_dataset
from convoy.storage.local_store import LocalStore
from convoy.storage.member_predictions import MemberLogits
from convoy.vision.presets import EvalPreset

PRESET = EvalPreset(resize_px=None, crop_px=32)
MODELS = [
    FoldModel(
        bundle=f"bundles/fold{index}/v1",
        fold=Fold(index=index, count=2),
        top1=0.5,
        epochs=((1, 0.1 + index / 2), (2, 0.2 + index / 2)),
        within_error_budget=index == 0,
    )
    for index in range(2)
]


def outcome(
    monkeypatch: pytest.MonkeyPatch,
    logits_VNK: np.ndarray[Any, Any],
    crops: CropPolicy,
    *,
    gives_probabilities: bool = True,
) -> dict[str, Any]:
    """Of two folds together, all of whose rows have label 0."""
    num_rows = logits_VNK.shape[1]
    logits = MemberLogits(
        sample_ids=[str(row) for row in range(num_rows)],
        labels_N=np.zeros(num_rows, np.int32),
        logits_MVNK=logits_VNK[None],
    )
    classifier = SimpleNamespace(
        backbone=SimpleNamespace(preset=PRESET), gives_probabilities=gives_probabilities
    )
    fakes = {
        "_member": lambda setting, bundle: SimpleNamespace(classifier=classifier),
        "_cost": lambda *args: None,
        "out_of_fold": lambda *args, **named: OutOfFold(logits=logits, rejected=("z",), runs=("a", "b")),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(trial_outcomes, name, fake)
    training: Any = SimpleNamespace(dataset="digits", rows=None, extraction=None)
    nothing: Any = None
    setting = TrialSetting(store=nothing, manifest=nothing, training=training, crops=crops, cluster_share=1.0)
    return outcome_of_folds(setting, MODELS)


def test_a_cost_says_with_what_share_of_the_cluster_it_was_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = trial_outcomes._ImageSeconds(in_networks=0.5, once=0.0)
    monkeypatch.setattr(trial_outcomes, "_image_seconds", lambda store, run: seconds)
    nothing: Any = None
    setting = TrialSetting(store=nothing, manifest=nothing, training=nothing, crops=None, cluster_share=0.25)
    cost = trial_outcomes._cost(setting, [], ["a", "b"], CropPlan(policy=CropPolicy.TEN))
    assert (cost.images_per_s, cost.cluster_share) == (1.0, 0.25)
    assert cost.seconds_per_pass == pytest.approx(0.25 / 10)


def test_networks_of_folds_decode_an_image_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {
        "a": trial_outcomes._ImageSeconds(in_networks=0.2, once=0.5),
        "b": trial_outcomes._ImageSeconds(in_networks=0.3, once=0.4),
    }
    monkeypatch.setattr(trial_outcomes, "_image_seconds", lambda store, run: seconds[run])
    nothing: Any = None
    setting = TrialSetting(store=nothing, manifest=nothing, training=nothing, crops=None, cluster_share=1.0)
    cost = trial_outcomes._cost(setting, [], ["a", "b"], CropPlan(policy=CropPolicy.TEN))
    assert (cost.images_per_s, cost.network_share) == (1.0, 0.5)
    assert cost.seconds_per_pass == pytest.approx(0.5 / 10)
    assert cost.seconds_once == pytest.approx(0.5)


def test_without_a_measured_rate_nothing_is_said_of_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_outcomes, "_image_seconds", lambda store, run: None)
    nothing: Any = None
    setting = TrialSetting(store=nothing, manifest=nothing, training=nothing, crops=None, cluster_share=1.0)
    cost = trial_outcomes._cost(setting, [], ["a"], CropPlan(policy=CropPolicy.TEN))
    assert (cost.images_per_s, cost.seconds_per_pass, cost.seconds_once) == (None, None, 0.0)


def test_the_epochs_of_a_trial_with_folds_are_those_of_its_first_fold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = outcome(monkeypatch, np.zeros((1, 3, 2)), CropPolicy.CENTER)
    assert found["epochs"] == MODELS[0].epochs


def test_what_a_trial_rejected_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of folds those of all of them."""
    found = outcome(monkeypatch, np.zeros((1, 3, 2)), CropPolicy.CENTER)
    assert (found["rejects"], found["within_error_budget"]) == (1, False)
    predictions = SimpleNamespace(run_id="run", manifest=SimpleNamespace(num_rejects=3))
    monkeypatch.setattr(trial_outcomes, "_predict_validation_rows", lambda *args: predictions)
    report = TrainReport.model_construct(
        bundle="bundles/one/v1",
        top1=0.5,
        intervals={"top1_wilson": None},
        nll=1.0,
        within_error_budget=False,
    )
    nothing: Any = None
    setting = TrialSetting(store=nothing, manifest=nothing, training=nothing, crops=None, cluster_share=1.0)
    found = outcome_of_training(setting, report)
    assert (found["rejects"], found["within_error_budget"]) == (3, False)


def test_the_model_of_a_fold_keeps_its_epochs_and_budget_for_a_call_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_digits(tmp_path / "images", 30)
    store = LocalStore(str(tmp_path / "workspace"))
    freeze_dataset(store, "digits", str(tmp_path / "images"), splits=SplitOptions())
    config = parse_config(
        TrainConfig,
        {
            "workspace": store.root_uri,
            "name": "probe",
            "dataset": "digits",
            "backbone": {"arch": "lenet5", "weights": "random"},
            "tap": "f6",
        },
        where="test",
    )
    numbers = dict.fromkeys(EpochResult.model_fields, 1)
    epochs = [
        EpochResult.model_validate({**numbers, "phase": "all", "epoch": epoch, "val_top1": epoch / 10})
        for epoch in (1, 2)
    ]
    report = TrainReport.model_construct(
        bundle="bundles/probe/v1", top1=0.2, history=epochs, within_error_budget=False
    )
    monkeypatch.setattr(folds, "run_train", lambda training, **named: report)
    monkeypatch.setattr(folds, "peek_bundle", lambda store, bundle: None)
    monkeypatch.setattr(folds, "resolve_bundle", lambda store, bundle: None)

    def trained() -> list[FoldModel]:
        return train_folds(config, 2, progress=Silent(), draw_curves=lambda history: b"")

    assert [model.epochs for model in trained()] == [((1, 0.1), (2, 0.2))] * 2
    monkeypatch.delattr(folds, "run_train")
    known = trained()[0]
    assert known.epochs == ((1, 0.1), (2, 0.2)), "known, so not trained again"
    assert not known.within_error_budget


@pytest.mark.parametrize("gives_probabilities", [True, False])
def test_without_a_central_crop_a_trial_is_worth_what_the_mean_of_its_crops_is(
    monkeypatch: pytest.MonkeyPatch, *, gives_probabilities: bool
) -> None:
    """Of the corner that comes first alone, half of the rows would be wrong."""
    num_views = len(crop_views(CropPlan(policy=CropPolicy.MULTISCALE)))
    logits_VNK = np.tile(np.array([2.0, 0.0]), (num_views, 4, 1))
    logits_VNK[0, :2] = [0.0, 2.0]
    found = outcome(monkeypatch, logits_VNK, CropPolicy.MULTISCALE, gives_probabilities=gives_probabilities)
    likely = 1 / (1 + np.exp(-2))
    one_corner_less = likely + (1 - 2 * likely) / num_views
    nll = pytest.approx(-(np.log(one_corner_less) + np.log(likely)) / 2)
    assert found["top1"] == 1.0
    assert found["nll"] == (nll if gives_probabilities else None), "margins have none"


def test_a_trial_with_a_central_crop_is_worth_what_that_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for policy, center in (
        (CropPolicy.CENTER, 0),
        (CropPolicy.FLIP, 0),
        (CropPolicy.FIVE, 4),
        (CropPolicy.TEN, 4),
    ):
        logits_VNK = np.tile(np.array([0.0, 2.0]), (len(crop_views(CropPlan(policy=policy))), 4, 1))
        logits_VNK[center] = [2.0, 0.0]
        assert outcome(monkeypatch, logits_VNK, policy)["top1"] == 1.0
