from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import log_softmax, softmax

from convoy.core.crop_policies import Averaging
from convoy.vision.ensembling import (
    Objective,
    error_overlap,
    fit_member_temperature,
    fit_temperature,
    greedy_selection,
    joint_logits,
    least_nll_weights,
    mean_nll,
    mean_of_views,
    member_values,
    ranked_members,
    top1,
    uniform_top_k,
)

NUM_ROWS, NUM_CLASSES = 600, 4
BOTH = pytest.mark.parametrize("averaging", list(Averaging))


@pytest.fixture
def labels_N() -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(0, NUM_CLASSES, NUM_ROWS)


def noisy(labels_N: NDArray[np.int64], noise: float, seed: int, views: int = 2) -> NDArray[np.float32]:
    """Logits_VNK that point at the label, behind noise of their own."""
    rng = np.random.default_rng(seed)
    signal_NK = 2.0 * np.eye(NUM_CLASSES)[labels_N]
    return (signal_NK + rng.normal(0, noise, (views, len(labels_N), NUM_CLASSES))).astype(np.float32)


def library(labels_N: NDArray[np.int64], *noises: float) -> NDArray[np.float32]:
    return np.stack([noisy(labels_N, noise, seed) for seed, noise in enumerate(noises)])


def values(logits_MVNK: NDArray[np.float32], averaging: Averaging) -> NDArray[np.float64]:
    return member_values(logits_MVNK, [0, 1], averaging, [1.0] * len(logits_MVNK))


def test_the_joint_output_is_the_committees_formula(labels_N: NDArray[np.int64]) -> None:
    logits_MVNK = library(labels_N, 1.0, 2.0)
    weights, temperatures = [0.3, 0.7], [0.5, 2.0]
    scaled = logits_MVNK.astype(np.float64) / np.array(temperatures)[:, None, None, None]
    expected_NK = np.einsum("m,mnk->nk", weights, softmax(scaled, axis=3).mean(axis=1))
    found_MNK = member_values(logits_MVNK, [0, 1], Averaging.PROBABILITIES, temperatures)
    np.testing.assert_allclose(
        joint_logits(found_MNK, weights, Averaging.PROBABILITIES, 1.5), np.log(expected_NK) / 1.5, atol=1e-12
    )
    found_MNK = member_values(logits_MVNK, [1], Averaging.LOGITS, temperatures)
    expected_NK = np.einsum("m,mnk->nk", weights, scaled[:, 1])
    np.testing.assert_allclose(joint_logits(found_MNK, weights, Averaging.LOGITS), expected_NK, atol=1e-12)


@BOTH
def test_values_take_little_memory_beside_themselves(averaging: Averaging) -> None:
    logits_MVNK = np.zeros((6, 10, 1000, 50), np.float32)
    tracemalloc.start()
    try:
        values_MNK = member_values(logits_MVNK, range(10), averaging, [1.0] * 6)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < values_MNK.nbytes + 6 * values_MNK[0].nbytes


@BOTH
def test_the_mean_of_views_is_that_of_one_member(labels_N: NDArray[np.int64], averaging: Averaging) -> None:
    logits_MVNK = library(labels_N, 1.0)
    values_MNK = member_values(logits_MVNK, [0, 1], averaging, [2.0])
    np.testing.assert_allclose(
        mean_of_views(logits_MVNK[0], averaging, 2.0), joint_logits(values_MNK, [1.0], averaging), atol=1e-12
    )


def test_the_temperature_that_scaled_the_logits_is_found_again() -> None:
    rng = np.random.default_rng(1)
    logits_NK = rng.normal(0, 1.5, (20_000, NUM_CLASSES))
    labels_N = np.array([rng.choice(NUM_CLASSES, p=row) for row in softmax(logits_NK, axis=1)])
    for temperature in (0.4, 1.0, 3.0):
        found = fit_temperature(logits_NK * temperature, labels_N)
        assert found == pytest.approx(temperature, rel=0.05)


@BOTH
def test_no_other_temperature_of_a_member_makes_the_labels_likelier(
    labels_N: NDArray[np.int64], averaging: Averaging
) -> None:
    """By the mean over its views, each at the temperature, as it is used."""
    logits_VNK = 3 * library(labels_N, 1.0)[0]

    def nll(temperature: float) -> float:
        return mean_nll(mean_of_views(logits_VNK, averaging, temperature), labels_N)

    found = fit_member_temperature(logits_VNK, labels_N, averaging)
    assert nll(found) <= min(nll(found * factor) for factor in (0.5, 0.9, 0.98, 1.02, 1.1, 2.0))


@BOTH
def test_members_that_err_elsewhere_share_the_weight(
    labels_N: NDArray[np.int64], averaging: Averaging
) -> None:
    values_MNK = values(library(labels_N, 1.5, 1.5, 1.5), averaging)
    for weights_M in (
        greedy_selection(values_MNK, labels_N, averaging),
        least_nll_weights(values_MNK, labels_N, averaging),
        uniform_top_k(values_MNK, labels_N, averaging),
    ):
        assert weights_M.sum() == pytest.approx(1)
        assert (weights_M > 0.15).all()
        joint_NK = joint_logits(values_MNK, weights_M, averaging)
        best_alone = max(top1(joint_logits(values_MNK, one, averaging), labels_N) for one in np.eye(3))
        assert top1(joint_NK, labels_N) > best_alone + 0.02


@BOTH
@pytest.mark.parametrize("objective", list(Objective))
def test_a_member_that_knows_nothing_is_left_out(
    labels_N: NDArray[np.int64], averaging: Averaging, objective: Objective
) -> None:
    nothing = noisy(np.random.default_rng(9).integers(0, NUM_CLASSES, NUM_ROWS), 3.0, 7)
    logits_MVNK = np.concatenate([library(labels_N, 0.8, 0.8), nothing[None]])
    values_MNK = values(logits_MVNK, averaging)
    assert greedy_selection(values_MNK, labels_N, averaging, objective=objective, num_bags=1)[2] < 0.1
    assert least_nll_weights(values_MNK, labels_N, averaging)[2] < 0.05
    assert ranked_members(values_MNK, labels_N, averaging, objective)[-1] == 2


def test_a_copy_of_a_member_changes_no_prediction(labels_N: NDArray[np.int64]) -> None:
    one = library(labels_N, 1.0)
    values_MNK = values(np.concatenate([one, one]), Averaging.PROBABILITIES)
    for weights_M in (
        greedy_selection(values_MNK, labels_N, Averaging.PROBABILITIES),
        least_nll_weights(values_MNK, labels_N, Averaging.PROBABILITIES),
    ):
        joint_NK = joint_logits(values_MNK, weights_M, Averaging.PROBABILITIES)
        np.testing.assert_allclose(np.exp(joint_NK), values_MNK[0], atol=1e-12)


@BOTH
def test_no_other_weights_have_a_smaller_nll(labels_N: NDArray[np.int64], averaging: Averaging) -> None:
    values_MNK = values(library(labels_N, 0.7, 1.5, 2.5), averaging)
    least = mean_nll(
        joint_logits(values_MNK, least_nll_weights(values_MNK, labels_N, averaging), averaging), labels_N
    )
    for weights_M in np.random.default_rng(3).dirichlet(np.ones(3), 200):
        assert mean_nll(joint_logits(values_MNK, weights_M, averaging), labels_N) >= least - 1e-4


@pytest.mark.parametrize("sureness", [40.0, 1000.0])
def test_the_least_nll_of_members_that_are_too_sure_is_found(
    labels_N: NDArray[np.int64], sureness: float
) -> None:
    """The most that other weights could lower the NLL: it is convex, and this is its slope to each member alone."""
    rng = np.random.default_rng(0)
    logits_MNK = rng.normal(0, 1, (5, NUM_ROWS, NUM_CLASSES))
    logits_MNK += np.linspace(0.3, 2.5, 5)[:, None, None] * np.eye(NUM_CLASSES)[labels_N]
    values_MNK = member_values(
        sureness * logits_MNK[:, None], [0], Averaging.PROBABILITIES, [1.0] * len(logits_MNK)
    )
    own_MN = np.maximum(values_MNK[:, np.arange(NUM_ROWS), labels_N], np.finfo(np.float64).tiny)
    weights_M = least_nll_weights(values_MNK, labels_N, Averaging.PROBABILITIES)
    assert (own_MN / (weights_M @ own_MN)).mean(axis=1).max() - 1 < 1e-3


def test_equal_seeds_give_equal_weights_and_bags_differ(labels_N: NDArray[np.int64]) -> None:
    values_MNK = values(library(labels_N, *np.linspace(1.0, 1.5, 12)), Averaging.PROBABILITIES)
    first = greedy_selection(values_MNK, labels_N, Averaging.PROBABILITIES, seed=1)
    np.testing.assert_array_equal(
        first, greedy_selection(values_MNK, labels_N, Averaging.PROBABILITIES, seed=1)
    )
    assert not np.array_equal(
        first, greedy_selection(values_MNK, labels_N, Averaging.PROBABILITIES, num_bags=1)
    )


def test_two_members_that_know_nothing_get_no_weight_from_any_bag(labels_N: NDArray[np.int64]) -> None:
    nothing = [noisy(np.random.default_rng(seed).permutation(labels_N), 3.0, seed) for seed in range(20, 26)]
    logits_MVNK = np.concatenate([library(labels_N, 0.8, 0.8, 0.9), np.stack(nothing)])
    values_MNK = values(logits_MVNK, Averaging.PROBABILITIES)
    for count in (5, 9):
        weights_M = greedy_selection(values_MNK[:count], labels_N, Averaging.PROBABILITIES)
        assert weights_M[3:].sum() < 0.05


@BOTH
def test_the_greedy_weights_are_at_least_as_good_as_the_best_member_and_the_best_mean(
    labels_N: NDArray[np.int64], averaging: Averaging
) -> None:
    values_MNK = values(library(labels_N, 0.8, 1.0, 2.0, 3.0), averaging)

    def loss(weights_M: NDArray[np.float64]) -> float:
        return mean_nll(joint_logits(values_MNK, weights_M, averaging), labels_N)

    greedy = loss(greedy_selection(values_MNK, labels_N, averaging))
    assert greedy <= min(loss(one) for one in np.eye(4))
    assert greedy <= loss(uniform_top_k(values_MNK, labels_N, averaging))
    # The rows and rounds of greedy are coarse, but not by much.
    assert greedy <= loss(least_nll_weights(values_MNK, labels_N, averaging)) + 0.01


@BOTH
@pytest.mark.parametrize("objective", list(Objective))
def test_every_round_takes_the_member_with_which_the_loss_is_smallest(
    labels_N: NDArray[np.int64], averaging: Averaging, objective: Objective
) -> None:
    # The last member is a copy, so there are ties in every round.
    values_MNK = values(library(labels_N, 0.9, 1.0, 1.1, 2.5), averaging)[[0, 1, 2, 3, 1]]

    def loss(counts_M: NDArray[np.float64]) -> tuple[float, float]:
        joint_NK = joint_logits(values_MNK, counts_M / counts_M.sum(), averaging)
        both = mean_nll(joint_NK, labels_N), 1 - top1(joint_NK, labels_N)
        first, second = both if objective is Objective.NLL else both[::-1]
        return round(first, 9), round(second, 9)

    counts_M = (uniform_top_k(values_MNK, labels_N, averaging, objective=objective) > 0).astype(float)
    tried = [counts_M]
    while counts_M.sum() < 12:
        counts_M = min((counts_M + one for one in np.eye(len(values_MNK))), key=loss)
        tried.append(counts_M)
    best_M = min(tried, key=loss)
    found_M = greedy_selection(values_MNK, labels_N, averaging, objective=objective, num_rounds=12)
    np.testing.assert_allclose(found_M, best_M / best_M.sum())


@pytest.mark.parametrize("objective", list(Objective))
def test_a_selection_keeps_no_copy_of_the_values(objective: Objective) -> None:
    rng = np.random.default_rng(0)
    values_MNK, labels_N = rng.normal(size=(20, 500, 100)), rng.integers(0, 100, 500)
    tracemalloc.start()
    try:
        greedy_selection(
            values_MNK, labels_N, Averaging.LOGITS, objective=objective, num_rounds=3, num_bags=1
        )
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < values_MNK.nbytes / 2


def test_errors_that_never_meet_do_not_overlap() -> None:
    labels_N = np.zeros(4, np.int64)
    right, wrong = np.array([2.0, 0.0]), np.array([0.0, 2.0])
    first = np.array([[right, right, wrong, wrong]])
    second = np.array([[wrong, wrong, right, right]])
    overlap_MM = error_overlap(np.concatenate([first, second, first]), labels_N)
    np.testing.assert_array_equal(overlap_MM, [[1, 0, 1], [0, 1, 0], [1, 0, 1]])


def test_the_nll_is_that_of_the_softmax(labels_N: NDArray[np.int64]) -> None:
    logits_NK = noisy(labels_N, 1.0, 0)[0]
    expected = -log_softmax(logits_NK.astype(np.float64), axis=1)[np.arange(NUM_ROWS), labels_N].mean()
    assert mean_nll(logits_NK, labels_N) == pytest.approx(expected)
