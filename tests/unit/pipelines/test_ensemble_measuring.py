from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from convoy.core.crop_policies import CropPolicy
from convoy.core.errors import ConfigError
from convoy.core.progress import Silent
from convoy.core.statistics import bootstrap_difference, wilson_interval
from convoy.pipelines import ensemble_measuring
from convoy.pipelines.committees import CommitteeMember, CommitteeRecord, committee_of
from convoy.pipelines.ensemble_choice import (
    EnsembleBudget,
    EnsembleChooser,
    EnsembleSettings,
    SelectionMethod,
)
from convoy.pipelines.ensemble_measuring import UntouchedRows, cross_fitted
from convoy.pipelines.feature_plan import ExtractionConfig
from convoy.pipelines.prediction_request import PredictionRequest
from convoy.storage.local_store import LocalStore
from convoy.storage.member_predictions import MemberLogits
from convoy.storage.runs import RunFolder
from made_bundles import DIGITS, made_classifier
from made_ensembles import LABELS_N, NUM_CLASSES, NUM_ROWS, made_candidates


def test_each_validation_row_is_measured_once_by_an_ensemble_that_did_not_see_it() -> None:
    candidates = made_candidates(1.2, 1.2, 1.5)
    measured = cross_fitted(candidates, EnsembleSettings())
    assert measured.gain.rows == "val, cross-fitted"
    assert measured.gain.num_rows == NUM_ROWS
    assert measured.gain.difference.low > 0
    assert measured.gain.mcnemar.mid_p < 0.05
    for bins in (measured.reliability_before, measured.reliability_after):
        assert sum(one.num_rows for one in bins) == NUM_ROWS


def test_what_gates_hold_is_measured_on_rows_that_had_no_part_in_them() -> None:
    candidates = made_candidates(0.6, 0.8, 1.0)
    candidates.logits_MVNK[:, :, ::2] *= 2
    settings = EnsembleSettings(method=SelectionMethod.TOP_K, gate=0.9)
    outcomes = cross_fitted(candidates, settings).gates
    assert list(outcomes) == sorted({*outcomes, 0.9})
    assert outcomes[0.9].speedup > 1.1
    # No row is without one, so the share is one of all rows.
    assert outcomes[0.9].agreement * NUM_ROWS == pytest.approx(round(outcomes[0.9].agreement * NUM_ROWS))
    assert 0.9 <= outcomes[0.9].agreement < 1
    for outcome in outcomes.values():
        assert abs(outcome.top1_change) <= 1 - outcome.agreement + 1e-12
    # 267 of the 400 rows of a fold cannot show 99.5 %.
    assert (outcomes[0.995].agreement, outcomes[0.995].speedup) == (1, 1)
    assert cross_fitted(candidates, EnsembleSettings(method=SelectionMethod.TOP_K)).gates == {}


def test_folds_for_which_memory_is_short_are_measured_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    candidates, settings = made_candidates(1.2, 1.5), EnsembleSettings(rounds=5, bags=1)
    in_memory = cross_fitted(candidates, settings)
    monkeypatch.setattr("convoy.core.large_arrays.free_memory_bytes", lambda: 0)
    assert cross_fitted(candidates, settings).gain == in_memory.gain


def test_members_that_only_guess_are_not_praised_for_what_fits_by_chance() -> None:
    """On the rows that choose among 30 guessers the best looks better than chance; on the others it is not."""
    candidates = made_candidates(*[1.0] * 30, policy=CropPolicy.CENTER)
    random = np.random.default_rng(3)
    guesses = replace(
        candidates, logits_MVNK=random.normal(size=candidates.logits_MVNK.shape).astype(np.float32)
    )
    settings = EnsembleSettings(objective="top1", calibrate=False, rounds=10, bags=1)
    seen = EnsembleChooser(guesses, settings).choose().point
    gain = cross_fitted(guesses, settings).gain
    three_errors = 3 * np.sqrt(1 / NUM_CLASSES * (1 - 1 / NUM_CLASSES) / NUM_ROWS)
    assert seen.top1 > 1 / NUM_CLASSES + three_errors
    assert abs(gain.top1 - 1 / NUM_CLASSES) < three_errors
    assert gain.difference.low < 0 < gain.difference.high


def test_a_temperature_mends_the_confidence_of_rows_that_did_not_fit_it() -> None:
    candidates = made_candidates(1.2, 1.2, 1.5)
    candidates.logits_MVNK[:] *= 4
    measured = cross_fitted(candidates, EnsembleSettings())

    def gap(bins: list) -> float:
        known = [one for one in bins if one.num_rows]
        return sum(one.num_rows * abs(one.accuracy - one.mean_confidence) for one in known) / NUM_ROWS

    raw = cross_fitted(candidates, EnsembleSettings(calibrate=False))
    assert gap(measured.reliability_after) < gap(raw.reliability_after)
    assert len(LABELS_N) == NUM_ROWS


def test_a_budget_counts_for_every_fold() -> None:
    with pytest.raises(ConfigError, match="within the budget"):
        cross_fitted(
            made_candidates(1.0, 1.0), EnsembleSettings(budget=EnsembleBudget(min_images_per_s=1000))
        )


def test_a_single_member_with_another_class_order_is_judged_by_its_own_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs keep logits and labels in the class order of their own committee."""
    store = LocalStore(str(tmp_path))
    truth_N = np.random.default_rng(0).integers(0, len(DIGITS), NUM_ROWS)
    sure_NK = (10 * np.eye(len(DIGITS))[truth_N]).astype(np.float32)

    def committee(name: str, classes: Sequence[str]) -> CommitteeRecord:
        classifier = made_classifier(store, 1, classes=tuple(classes))
        member = CommitteeMember(name=name, digest=name, bundle=None, classifier=classifier, weight=1)
        return committee_of([member])

    def evaluated(_store: object, _manifest: object, request: PredictionRequest, **_: Any) -> Any:
        return SimpleNamespace(run=request.committee)

    def kept(folder: RunFolder) -> MemberLogits:
        order = [DIGITS.index(name) for name in folder.run_id.classes]  # type: ignore[attr-defined]
        return MemberLogits(
            sample_ids=[f"{row:04d}" for row in range(NUM_ROWS)],
            labels_N=np.argsort(order)[truth_N].astype(np.int32),
            logits_MVNK=sure_NK[None, None][..., order],
        )

    monkeypatch.setattr(ensemble_measuring, "evaluate_committee", evaluated)
    monkeypatch.setattr(ensemble_measuring, "read_predictions", kept)
    monkeypatch.setattr(UntouchedRows, "_by_size", lambda *_: [])
    rows = UntouchedRows(
        store,
        None,  # type: ignore[arg-type]
        committee("ensemble", DIGITS),
        committee("single", DIGITS[::-1]),
        dataset="digits",
        extraction=ExtractionConfig(),
        progress=Silent(),
    )
    gain = rows.measured().gain
    assert (gain.top1, gain.best_single_top1) == (1, 1)


def test_crops_and_sizes_have_intervals_of_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = made_candidates(1.2, 1.5)
    store, classes = LocalStore(str(tmp_path)), tuple("012")
    members = [
        CommitteeMember(
            name=name,
            digest=name,
            bundle=None,
            classifier=made_classifier(store, seed, classes=classes),
            weight=0.5,
        )
        for seed, name in enumerate(("one", "two"))
    ]
    both = MemberLogits(
        sample_ids=[f"{row:04d}" for row in range(NUM_ROWS)],
        labels_N=made.labels_N,
        logits_MVNK=made.logits_MVNK,
    )
    monkeypatch.setattr(ensemble_measuring, "evaluate_committee", lambda *_, **__: SimpleNamespace(run="run"))
    monkeypatch.setattr(ensemble_measuring, "read_predictions", lambda _: both)
    measured = UntouchedRows(
        store,
        None,  # type: ignore[arg-type]
        committee_of(members, plan=made.plan),
        committee_of(members[:1], plan=made.plan),
        dataset="digits",
        extraction=ExtractionConfig(),
        progress=Silent(),
    ).measured()
    assert [row.crops for row in measured.by_crops] == [CropPolicy.CENTER, CropPolicy.FLIP]
    for row in (*measured.by_crops, *measured.by_size):
        assert row.top1_interval == wilson_interval(round(row.top1 * NUM_ROWS), NUM_ROWS)
        assert row.gain is not None
        assert row.gain.low <= row.gain.estimate <= row.gain.high
    assert measured.by_crops[-1].gain == measured.by_size[-1].gain == measured.gain.difference
    # The member with the largest weight is the single one.
    assert measured.by_size[0].gain == bootstrap_difference(np.ones(NUM_ROWS), np.ones(NUM_ROWS))
