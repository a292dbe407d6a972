"""The gate of a retraining: what lets a candidate through, and what stops it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from convoy.core.errors import DataError
from convoy.pipelines.retrain_gate import GateConfig, GateEvidence, ModelScores, judge, pair, summary

CLASSES = ("cat", "dog")
NUM_ROWS = 400
GATE = GateConfig(margin=0.02)


def scores(
    wrong: int | list[int], *, ece: float | None = 0.05, macs: int = 100, rows: int = NUM_ROWS
) -> ModelScores:
    """A model that is wrong on the first rows, or on these; even rows are cats."""
    correct_N = np.ones(rows, np.bool_)
    correct_N[range(wrong) if isinstance(wrong, int) else wrong] = False
    return ModelScores(
        labels_N=np.arange(rows) % 2,
        correct_N=correct_N,
        found_N=np.ones(rows, np.bool_),
        ece=ece,
        macs=macs,
    )


def gated(candidate: ModelScores, champion: ModelScores, config: GateConfig = GATE) -> GateEvidence:
    few = scores(0, rows=5)
    return judge((candidate, few), (champion, few), CLASSES, config)


def failed(evidence: GateEvidence) -> set[str]:
    return {check.name for check in evidence.checks if not check.passed}


def test_a_better_candidate_passes() -> None:
    evidence = gated(scores(20), scores(40))
    assert evidence.passed
    assert evidence.newest is None
    assert evidence.holdout.difference.estimate == pytest.approx(0.05)
    assert "no check objects" in evidence.reason


def test_a_worse_candidate_is_held_and_the_reason_says_by_how_much() -> None:
    evidence = gated(scores(40), scores(20))
    assert failed(evidence) >= {"gain", "margin"}
    assert "-0.0500" in evidence.reason


def test_a_small_gain_that_may_be_a_loss_is_held_by_the_margin() -> None:
    # 40 rows are won and 36 lost: a gain, but its interval reaches below the margin.
    evidence = gated(scores(list(range(36))), scores(list(range(100, 140))))
    assert failed(evidence) == {"margin"}
    assert gated(scores(list(range(36))), scores(list(range(100, 140))), GateConfig(margin=0.05)).passed


def test_few_rows_do_not_show_that_nothing_is_lost_and_the_reason_says_how_many_it_takes() -> None:
    evidence = gated(scores(0, rows=60), scores(0, rows=60))
    assert failed(evidence) == {"margin"}
    assert "on 60 rows even of equal models that is 0.0447" in evidence.reason
    assert gated(scores(0), scores(0)).passed


def test_a_class_that_is_given_up_for_the_others_is_no_gain() -> None:
    cats = list(range(0, 80, 2))
    dogs = list(range(1, 181, 2))
    evidence = gated(scores(cats), scores(dogs))
    assert failed(evidence) == {"class_floor"}
    assert "class cat loses 0.2000" in evidence.reason


def test_a_class_of_few_rows_is_not_judged() -> None:
    few = replace(scores(20), labels_N=np.array([0] * 10 + [1] * (NUM_ROWS - 10)))
    champion = replace(scores(list(range(10, 40))), labels_N=few.labels_N)
    names = {check.name: check.text for check in gated(few, champion).checks}
    assert "class dog" in names["class_floor"]


def test_calibration_and_cost_have_their_limits() -> None:
    assert failed(gated(scores(20, ece=0.2), scores(40))) == {"calibration"}
    assert failed(gated(scores(20, macs=200), scores(40))) == {"cost"}
    assert gated(scores(20, ece=None), scores(40)).passed


def test_a_candidate_that_is_worse_on_the_newest_rows_is_held() -> None:
    newest = (scores(15, rows=50), scores(0, rows=50))
    evidence = judge((scores(20), newest[0]), (scores(40), newest[1]), CLASSES, GATE)
    assert failed(evidence) == {"newest"}
    assert summary(evidence)["failed"] == ["newest"]
    # One row more or less is chance.
    noise = judge((scores(20), scores(1, rows=50)), (scores(40), newest[1]), CLASSES, GATE)
    assert noise.passed


def test_only_rows_that_both_models_saw_are_compared() -> None:
    blind = replace(scores(20), found_N=np.arange(NUM_ROWS) >= 20)
    evidence = gated(blind, scores(20))
    assert evidence.holdout.rows == NUM_ROWS - 20
    assert evidence.holdout.top1 == (1.0, 1.0)


def test_models_that_saw_no_row_in_common_cannot_be_compared() -> None:
    seen_N = np.arange(NUM_ROWS) < 30
    with pytest.raises(DataError, match="no row was seen by both models") as caught:
        pair(replace(scores(20), found_N=seen_N), replace(scores(20), found_N=~seen_N))
    assert "30 and 370 of 400 rows" in str(caught.value)
