"""Neighbours, LogME and distances between domains, against other implementations and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_iris, load_wine
from sklearn.linear_model import BayesianRidge
from sklearn.neighbors import KNeighborsClassifier

from convoy.core.errors import DataError
from convoy.core.transferability import domain_distance, frechet_distance, knn_correct, logme


@pytest.mark.parametrize("num_neighbours", [1, 5])
def test_neighbours_vote_as_those_of_scikit_learn(num_neighbours: int) -> None:
    features_ND, labels_N = load_wine(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels_N))
    train, rest = order[:100], order[100:]
    theirs = KNeighborsClassifier(num_neighbours, metric="cosine").fit(features_ND[train], labels_N[train])
    votes_MC = theirs.predict_proba(features_ND[rest])
    clear_M = np.sort(votes_MC, axis=1)[:, -1] > np.sort(votes_MC, axis=1)[:, -2]
    ours_M = knn_correct(
        features_ND[train],
        labels_N[train],
        features_ND[rest],
        labels_N[rest],
        num_neighbours=num_neighbours,
    )
    their_M = theirs.predict(features_ND[rest]) == labels_N[rest]
    assert clear_M.sum() > 60
    assert ours_M[clear_M].tolist() == their_M[clear_M].tolist()


def test_among_equal_votes_the_nearer_neighbour_decides() -> None:
    train_ND = np.array([[1.0, 0.1], [1.0, 0.5]])
    correct = knn_correct(train_ND, np.array([1, 0]), np.array([[1.0, 0.0]]), np.array([1]), num_neighbours=2)
    assert correct.tolist() == [True]


def test_neighbours_vote_by_their_weight() -> None:
    train_ND = np.array([[1.0, 0.1], [1.0, 0.2], [1.0, 0.3]])
    rows = (train_ND, np.array([1, 1, 0]), np.array([[1.0, 0.0]]), np.array([0]))
    assert knn_correct(*rows, num_neighbours=3).tolist() == [False]
    assert knn_correct(*rows, num_neighbours=3, weights_N=np.array([0.4, 0.4, 1.0])).tolist() == [True]


def test_neighbours_do_not_depend_on_how_small_the_activations_are() -> None:
    features_ND, labels_N = load_wine(return_X_y=True)
    correct = [
        knn_correct(scale * features_ND[::2], labels_N[::2], scale * features_ND[1::2], labels_N[1::2])
        for scale in (1.0, 2.0**-80)
    ]
    assert correct[0].tolist() == correct[1].tolist()
    assert correct[0].mean() > 0.6


def test_neighbours_need_rows_of_the_same_features() -> None:
    with pytest.raises(DataError, match="same features"):
        knn_correct(np.zeros((0, 2)), np.zeros(0, int), np.zeros((1, 2)), np.zeros(1, int))


def test_logme_is_the_evidence_that_another_maximisation_finds() -> None:
    features_ND, labels_N = load_iris(return_X_y=True)
    features_ND = features_ND - features_ND.mean(axis=0)
    theirs = []
    for label in range(3):
        model = BayesianRidge(
            fit_intercept=False,
            compute_score=True,
            max_iter=1000,
            tol=1e-10,
            alpha_1=0,
            alpha_2=0,
            lambda_1=0,
            lambda_2=0,
        )
        model.fit(features_ND, (labels_N == label).astype(float))
        theirs.append(model.scores_[-1] / len(labels_N))
    assert logme(features_ND, labels_N) == pytest.approx(np.mean(theirs), abs=2e-3)


def test_logme_prefers_features_that_say_something_of_the_labels() -> None:
    random = np.random.default_rng(0)
    labels_N = np.repeat([0, 1, 2], 50)
    noise_ND = random.normal(size=(150, 8))
    telling_ND = noise_ND + 3 * np.eye(8)[labels_N]
    assert logme(telling_ND, labels_N) > logme(noise_ND, labels_N) + 0.1


def test_logme_takes_more_features_than_rows() -> None:
    random = np.random.default_rng(0)
    score = logme(random.normal(size=(20, 64)), np.arange(20) % 2)
    assert np.isfinite(score)


def test_logme_does_not_depend_on_the_scale_of_the_features() -> None:
    features_ND, labels_N = load_iris(return_X_y=True)
    assert logme(1e-13 * features_ND, labels_N) == pytest.approx(logme(features_ND, labels_N), rel=1e-9)


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_features_that_are_all_the_same_have_no_evidence(value: float) -> None:
    assert logme(np.full((20, 8), value), np.arange(20) % 2) is None


def test_the_distance_of_two_normal_samples_is_the_closed_form() -> None:
    random = np.random.default_rng(0)
    first_ND = random.normal(size=(4000, 2))
    second_ND = np.array([2.0, 3.0]) * random.normal(size=(4000, 2)) + np.array([1.0, -1.0])
    # (m1 - m2)^2 + sum of (s1 - s2)^2
    assert frechet_distance(first_ND, second_ND) == pytest.approx(2.0 + 1.0 + 4.0, rel=0.1)
    assert frechet_distance(first_ND, first_ND) == pytest.approx(0.0, abs=1e-6)


def test_another_domain_is_further_than_half_of_the_same() -> None:
    random = np.random.default_rng(0)
    reference_MD = random.normal(size=(600, 8))
    same = domain_distance(random.normal(size=(600, 8)), reference_MD, reference="r", tap="pooled")
    other = domain_distance(random.normal(size=(600, 8)) + 2, reference_MD, reference="r", tap="pooled")
    assert same.relative_at_half is not None
    assert same.relative_at_half < 3 * same.within_reference
    assert other.relative == pytest.approx(4.0, rel=0.2)
    assert other.relative > 10 * other.within_reference


@pytest.mark.parametrize("num_rows", [300, 400, 1000])
def test_no_difference_looks_like_the_baseline_however_few_the_images_are(num_rows: int) -> None:
    """By chance alone the distance goes with one over the number of images."""
    random = np.random.default_rng(0)
    features_ND, reference_MD = random.normal(size=(num_rows, 64)), random.normal(size=(400, 64))
    same = domain_distance(features_ND, reference_MD, reference="r", tap="pooled")
    assert same.relative_at_half == pytest.approx(same.within_reference, rel=0.15)
    assert same.relative < 0.85 * same.within_reference


def test_fewer_images_than_half_of_the_reference_are_compared_with_as_many() -> None:
    random = np.random.default_rng(0)
    features_ND, reference_MD = random.normal(size=(100, 64)), random.normal(size=(400, 64))
    same = domain_distance(features_ND, reference_MD, reference="r", tap="pooled")
    assert same.relative_at_half == pytest.approx(same.within_reference, rel=0.15)
