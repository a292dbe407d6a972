from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np
import pytest

from convoy.core.embedding import pca_map
from convoy.core.errors import ConfigError
from convoy.pipelines.embedding_maps import MapMethod, neighbour_agreement, place_points, require_method

RANDOM = np.random.default_rng(0)
FEATURES_ND = RANDOM.normal(size=(60, 8)).astype(np.float32)


def test_the_map_of_pca_needs_nothing_else() -> None:
    require_method(MapMethod.PCA)
    points_N2, explained = place_points(FEATURES_ND, MapMethod.PCA, 0)
    np.testing.assert_array_equal(points_N2, pca_map(FEATURES_ND).points_N2)
    assert explained is not None
    assert 0 < explained[1] <= explained[0] < 1


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ConfigError, match="umap-learn"):
        require_method(MapMethod.UMAP)


def test_umap_is_told_seed_and_neighbours_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}

    class Reducer:
        def __init__(self, **options: Any) -> None:
            told.update(options)

        def fit_transform(self, features_ND: np.ndarray) -> np.ndarray:
            return features_ND[:, :2]

    package = types.ModuleType("umap")
    package.UMAP = Reducer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "umap", package)
    points_N2, explained = place_points(FEATURES_ND[:9], MapMethod.UMAP, 7)
    assert (points_N2.shape, points_N2.dtype, explained) == ((9, 2), np.float64, None)
    assert (told["random_state"], told["n_neighbors"], told["metric"]) == (7, 8, "cosine")


def test_agreement_is_the_share_of_neighbours_with_the_same_label() -> None:
    centres_KD = 20 * np.eye(2, 8)
    labels_N = np.repeat([0, 1], 30)
    clustered_ND = (centres_KD[labels_N] + RANDOM.normal(size=(60, 8))).astype(np.float32)
    assert neighbour_agreement(clustered_ND, labels_N) == 1
    # Every row has another label: no neighbour agrees.
    assert neighbour_agreement(clustered_ND, np.arange(60)) == 0
    assert neighbour_agreement(clustered_ND, np.full(60, -1)) is None
