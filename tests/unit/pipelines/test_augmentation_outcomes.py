from __future__ import annotations

import numpy as np
import pytest

from convoy.pipelines.augmentation_outcomes import NamedPolicy, PolicyOutcome, Verdict, judge_outcomes
from convoy.vision.augmentation_policy import AugmentationPolicy
from convoy.vision.augmentation_strengths import AugmentationKind, Strength, policy_of

CLASSES = ("two", "five", "eight")
# A hundred rows of each class.
LABELS_N = np.repeat(np.arange(3), 100)


def predicted(*changes: tuple[int, int, slice]) -> np.ndarray:
    """All rows right, but for some of a class, by their places in it: (label, taken for, places)."""
    rows_N = LABELS_N.copy()
    for label, other, places in changes:
        rows_N[np.flatnonzero(label == LABELS_N)[places]] = other
    return rows_N


def outcome(
    with_N: np.ndarray, *, without_N: np.ndarray | None = None, drawn_N: np.ndarray | None = None
) -> PolicyOutcome:
    policy = policy_of(AugmentationKind.MIRROR, Strength.STRONG, crop_px=32)
    return PolicyOutcome(
        policy=NamedPolicy(name="mirror", strength=Strength.STRONG, policy=policy),
        labels_N=LABELS_N,
        without_N=predicted((0, 1, slice(0, 2))) if without_N is None else without_N,
        with_N=with_N,
        drawn_N=drawn_N,
    )


def test_a_loss_is_told_with_its_interval_and_the_classes_that_are_confused() -> None:
    (effect,) = judge_outcomes([outcome(predicted((0, 1, slice(0, 20)), (1, 0, slice(0, 12))))], CLASSES)
    assert effect.verdict is Verdict.LOSS
    assert effect.top1.estimate == pytest.approx(268 / 300)
    assert effect.difference.estimate == pytest.approx(-30 / 300)
    assert effect.difference.high < 0
    (pair,) = effect.confused
    assert (pair.first, pair.second, pair.num_rows, pair.without, pair.with_policy) == (
        "two",
        "five",
        200,
        2,
        32,
    )
    assert pair.p < 0.001
    assert effect.warning is not None
    assert effect.warning.startswith("mirror (strong) costs 10.0 points of top-1 (95 %: ")
    assert effect.warning.endswith("two and five are confused 32 times instead of 2 in 200")


def test_a_gain_is_no_reason_to_warn() -> None:
    without_N = predicted((0, 1, slice(0, 30)), (1, 2, slice(0, 10)))
    with_N = predicted((2, 1, slice(0, 9)))
    (effect,) = judge_outcomes([outcome(with_N, without_N=without_N)], CLASSES)
    assert effect.verdict is Verdict.GAIN
    assert effect.difference.low > 0
    # Five and eight are confused as often as before, by other rows: no rise.
    assert effect.confused == []
    assert effect.warning is None


def test_what_may_be_chance_stays_undecided_and_silent() -> None:
    (effect,) = judge_outcomes([outcome(predicted((0, 1, slice(0, 5))))], CLASSES)
    assert effect.verdict is Verdict.UNDECIDED
    assert effect.difference.estimate == pytest.approx(-0.01)
    assert effect.confused[0].p > 0.05
    assert effect.warning is None


def test_p_values_count_how_many_policies_were_tried() -> None:
    """One of twenty would look significant by chance alone."""
    slight = outcome(predicted((0, 1, slice(0, 9))))
    alone = judge_outcomes([slight], CLASSES)[0]
    among_twenty = judge_outcomes([slight, *[outcome(predicted((0, 1, slice(0, 2))))] * 19], CLASSES)[0]
    assert alone.verdict is Verdict.LOSS
    assert among_twenty.verdict is Verdict.UNDECIDED
    assert among_twenty.adjusted_p == pytest.approx(20 * alone.adjusted_p)


def test_p_values_of_pairs_count_those_that_fell_too() -> None:
    """Which pairs rise is known only after they were tested."""
    with_N = predicted((0, 1, slice(0, 8)))
    (alone,) = judge_outcomes([outcome(with_N, without_N=predicted())], CLASSES)
    fell = predicted((1, 2, slice(0, 3)), (2, 0, slice(0, 3)))
    (among_three,) = judge_outcomes([outcome(with_N, without_N=fell)], CLASSES)
    assert [(pair.first, pair.second) for pair in among_three.confused] == [("two", "five")]
    assert among_three.confused[0].p == pytest.approx(3 * alone.confused[0].p)


def test_classes_that_a_kind_turns_into_one_another_are_found_without_a_loss() -> None:
    drawn_N = predicted((0, 1, slice(0, 60)), (1, 0, slice(0, 40)), (2, 1, slice(0, 70)))
    (effect,) = judge_outcomes([outcome(predicted((0, 1, slice(0, 2))), drawn_N=drawn_N)], CLASSES)
    assert effect.verdict is Verdict.UNDECIDED
    # Eights are taken for fives, but no fives for eights: that may just be a kind that the network does not know.
    (pair,) = effect.alike
    assert (pair.first, pair.second, pair.first_as_second, pair.second_as_first) == ("two", "five", 0.6, 0.4)
    assert effect.top1_as_drawn == pytest.approx(130 / 300)
    assert effect.warning is not None
    assert "turns two and five into one another: drawn, 60 % of two are taken for five" in effect.warning


def test_rows_that_one_side_could_not_read_do_not_count() -> None:
    with_N = predicted((0, 1, slice(0, 2)))
    with_N[200:250] = -1
    (effect,) = judge_outcomes([outcome(with_N)], CLASSES)
    assert effect.num_rows == 250
    assert effect.difference.estimate == 0
    assert (effect.mcnemar.only_first_correct, effect.mcnemar.only_second_correct) == (0, 0)


def test_a_policy_of_the_users_own_goes_by_its_name() -> None:
    named = NamedPolicy(name="mine", strength=None, policy=AugmentationPolicy.ready("standard"))
    assert str(named) == "mine"
    found = PolicyOutcome(policy=named, labels_N=LABELS_N, without_N=LABELS_N, with_N=(LABELS_N + 1) % 3)
    (effect,) = judge_outcomes([found], CLASSES)
    assert effect.strength is None
    assert effect.warning is not None
    assert effect.warning.startswith("mine costs 100.0 points")
