from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

from convoy.core.embedding import find_near_duplicates, nearest_neighbours, pca_map, unit_rows, whiten
from convoy.core.errors import ConfigError, DataError


def features(num_rows: int, num_features: int = 24, seed: int = 0) -> NDArray[np.float32]:
    """Like pooled activations: not negative, far from zero, and strongly correlated."""
    random = np.random.default_rng(seed)
    shared_FD = random.normal(size=(num_features, num_features))
    scales_F = np.geomspace(4, 0.05, num_features)
    return np.maximum(3 + random.normal(size=(num_rows, num_features)) * scales_F @ shared_FD, 0).astype(
        np.float32
    )


@pytest.mark.parametrize("shape", [(200, 24), (12, 40), (50, 2)])
def test_a_map_is_that_of_scikit_learn_up_to_sign(shape: tuple[int, int]) -> None:
    features_ND = features(*shape)
    found = pca_map(features_ND)
    reference = PCA(n_components=2, svd_solver="full").fit(features_ND.astype(np.float64))
    points_N2 = reference.transform(features_ND)
    signs_2 = np.sign((found.points_N2 * points_N2).sum(axis=0))
    np.testing.assert_allclose(found.points_N2, points_N2 * signs_2, atol=1e-8)
    np.testing.assert_allclose(found.explained, reference.explained_variance_ratio_, atol=1e-9)


def test_the_signs_of_a_map_do_not_depend_on_the_order_of_the_rows() -> None:
    features_ND = features(60)
    order = np.random.default_rng(1).permutation(60)
    np.testing.assert_allclose(
        pca_map(features_ND[order]).points_N2, pca_map(features_ND).points_N2[order], atol=1e-8
    )


def test_rows_on_a_line_have_a_map() -> None:
    found = pca_map(np.arange(5, dtype=np.float32)[:, None])
    np.testing.assert_allclose(found.points_N2[:, 0], np.arange(5) - 2)
    assert not found.points_N2[:, 1].any()
    assert found.explained == (1.0, 0.0)


@pytest.mark.parametrize("block_rows", [7, 64, 1000])
def test_neighbours_are_the_nearest_by_cosine_whatever_the_blocks(block_rows: int) -> None:
    features_ND = features(150)
    found = nearest_neighbours(features_ND, 5, block_rows=block_rows)
    reference = NearestNeighbors(n_neighbors=6, metric="cosine", algorithm="brute").fit(features_ND)
    distances_NK, rows_NK = reference.kneighbors(features_ND)
    np.testing.assert_array_equal(found.rows_NK, rows_NK[:, 1:])
    np.testing.assert_allclose(found.similarities_NK, 1 - distances_NK[:, 1:], atol=1e-5)


def test_a_row_is_never_its_own_neighbour_even_among_equal_ones() -> None:
    found = nearest_neighbours(np.ones((9, 3), np.float32), 2, block_rows=4)
    assert not (found.rows_NK == np.arange(9)[:, None]).any()
    np.testing.assert_allclose(found.similarities_NK, 1, atol=1e-6)


@pytest.mark.parametrize("scale", [3e-38, 3e-30, 1.0, 3e30, 1e38])
def test_rows_of_any_scale_have_length_one(scale: float) -> None:
    rows_ND = np.array([[1.0, -2.0, 2.0], [0.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
    given_ND = (scale * rows_ND).astype(np.float32)
    np.testing.assert_allclose(
        unit_rows(given_ND), [[1 / 3, -2 / 3, 2 / 3], [0, 0, 0], [0, -1, 0]], rtol=1e-6
    )
    np.testing.assert_array_equal(given_ND, (scale * rows_ND).astype(np.float32))


def test_neighbours_of_many_rows_need_no_matrix_of_all_pairs() -> None:
    features_ND = features(6000, 8)
    tracemalloc.start()
    nearest_neighbours(features_ND, 3)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # The similarities of all pairs alone would be 144 MB.
    assert peak_bytes < 100e6


def test_more_neighbours_than_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match="no 4 neighbours"):
        nearest_neighbours(np.eye(4), 4)


def test_whitened_rows_have_unit_variance_and_no_correlation() -> None:
    whitened_NC = whiten(features(500, 12)).astype(np.float64)
    np.testing.assert_allclose(whitened_NC.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(whitened_NC.T @ whitened_NC / 500, np.eye(whitened_NC.shape[1]), atol=1e-3)


def test_planted_duplicates_are_found_and_nothing_else() -> None:
    originals_ND = features(400, 128)
    random = np.random.default_rng(3)
    planted = random.choice(400, 30, replace=False)
    spread_D = originals_ND.std(axis=0)
    copies_ND = originals_ND[planted] + 0.02 * spread_D * random.normal(size=(30, 128))
    names = [*(f"o{row:03}" for row in range(400)), *(f"c{row:03}" for row in planted)]
    found = find_near_duplicates(np.concatenate([originals_ND, copies_ND]), names)
    assert {group.sample_ids for group in found.groups} == {(f"o{row:03}", f"c{row:03}") for row in planted}
    assert found.samples == 430
    scores = [group.score for group in found.groups]
    assert scores == sorted(scores, reverse=True)
    assert min(scores) >= found.threshold


def test_a_high_threshold_leaves_loose_pairs_out() -> None:
    originals_ND = features(400, 128)
    copies_ND = originals_ND[:10] + 0.35 * originals_ND.std(axis=0) * np.random.default_rng(3).normal(
        size=(10, 128)
    )
    rows_ND = np.concatenate([originals_ND, copies_ND])
    names = [str(row) for row in range(410)]
    assert len(find_near_duplicates(rows_ND, names, 0.2).groups) > len(
        find_near_duplicates(rows_ND, names, 0.8).groups
    )


def test_a_picture_that_is_there_forty_times_is_one_group() -> None:
    originals_ND = features(300, 128)
    rows_ND = np.concatenate([originals_ND, np.repeat(originals_ND[7:8], 39, axis=0)])
    (group,) = find_near_duplicates(rows_ND, [str(row) for row in range(339)]).groups
    assert group.sample_ids == ("7", *(str(row) for row in range(300, 339)))


def test_features_that_tell_nothing_apart_are_refused() -> None:
    with pytest.raises(DataError, match="the same"):
        find_near_duplicates(np.ones((20, 4), np.float32), [str(row) for row in range(20)])
    with pytest.raises(DataError, match="three images or more"):
        find_near_duplicates(np.eye(2), ["a", "b"])
