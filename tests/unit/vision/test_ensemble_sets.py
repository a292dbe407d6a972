from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from convoy.core.crop_policies import Averaging
from convoy.vision.ensemble_sets import growing_sets
from convoy.vision.ensembling import joint_logits, member_values, top1

NUM_ROWS, NUM_CLASSES = 600, 4
LABELS_N = np.random.default_rng(0).integers(0, NUM_CLASSES, NUM_ROWS)
BOTH = pytest.mark.parametrize("averaging", list(Averaging))


def made_values(*noises: float, averaging: Averaging = Averaging.PROBABILITIES) -> NDArray[np.float64]:
    """Values of members that point at the label, each behind noise of its own."""
    random = np.random.default_rng(1)
    signal_NK = 2.0 * np.eye(NUM_CLASSES)[LABELS_N]
    logits = [signal_NK + random.normal(0, noise, (1, NUM_ROWS, NUM_CLASSES)) for noise in noises]
    return member_values(np.stack(logits), [0], averaging, [1.0] * len(noises))


@BOTH
def test_every_member_alone_is_a_set_and_so_are_all_together(averaging: Averaging) -> None:
    values_MNK = made_values(1.0, 1.0, 1.5, averaging=averaging)
    sets = growing_sets(values_MNK, LABELS_N, averaging, costs_M=[1.0, 2.0, 1.0])
    assert {(0,), (1,), (2,), (0, 1, 2)} <= set(sets)
    assert len(set(sets)) == len(sets)


@BOTH
def test_cheap_members_are_joined_although_a_dear_one_is_the_best_alone(averaging: Averaging) -> None:
    values_MNK = made_values(1.0, 1.5, 1.5, 1.5, averaging=averaging)
    sets = growing_sets(values_MNK, LABELS_N, averaging, costs_M=[10.0, 1.0, 1.0, 1.0])
    assert (1, 2, 3) in sets

    def worth(*members: int) -> float:
        weights = [1 / len(members)] * len(members)
        return top1(joint_logits(values_MNK[list(members)], weights, averaging), LABELS_N)

    assert worth(1, 2, 3) > max(worth(1), worth(2), worth(3)) + 0.02


def test_of_two_that_help_alike_the_cheaper_one_comes_first() -> None:
    values_MNK = made_values(0.8, 1.0, 1.0, 3.0)
    values_MNK[2] = values_MNK[1]
    sets = growing_sets(values_MNK, LABELS_N, Averaging.PROBABILITIES, costs_M=[1.0, 1.0, 50.0, 1.0])
    assert (0, 1) in sets
    assert (0, 2) not in sets


def test_the_best_set_for_what_can_be_paid_is_among_them() -> None:
    """Of six, the second and fourth for exactly 7, between the sets that other budgets find."""
    values_MNK = made_values(1.5, 1.0, 0.8, 1.0, 2.0, 2.0)
    costs_M = [1.0, 5.0, 9.0, 2.0, 2.0, 2.0]
    unaware = growing_sets(values_MNK, LABELS_N, Averaging.PROBABILITIES, costs_M=costs_M)
    aware = growing_sets(values_MNK, LABELS_N, Averaging.PROBABILITIES, costs_M=costs_M, budget=7.0)
    assert (1, 3) not in unaware
    assert aware == [*unaware, (1, 3)]


def test_what_buys_nobody_adds_no_set() -> None:
    values_MNK = made_values(1.0, 1.0)
    sets = growing_sets(values_MNK, LABELS_N, Averaging.PROBABILITIES, costs_M=[1.0, 1.0], budget=0.5)
    assert sets == growing_sets(values_MNK, LABELS_N, Averaging.PROBABILITIES, costs_M=[1.0, 1.0])


def test_no_set_has_more_members_than_allowed() -> None:
    values_MNK = made_values(1.0, 1.0, 1.0, 1.0)
    sets = growing_sets(
        values_MNK, LABELS_N, Averaging.PROBABILITIES, costs_M=[1.0, 2.0, 3.0, 4.0], max_members=2
    )
    assert max(len(one) for one in sets) == 2
