"""Two-dimensional maps of features, with what is known of each point."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convoy.core.config import StrictModel
from convoy.core.embedding import nearest_neighbours, pca_map
from convoy.core.errors import ConfigError

_AGREEMENT_NEIGHBOURS = 5


class MapMethod(StrEnum):
    """How features become points of a plane."""

    PCA = "pca"
    UMAP = "umap"  # needs the package umap-learn


class MapColour(StrEnum):
    """What the colour of a point says."""

    LABEL = "label"
    ERROR = "error"


class MapPoint(StrictModel):
    """A sample on the map; `label` is null where it has none, and then `correct` too."""

    sample_id: str
    x: float
    y: float
    label: str | None
    predicted: str
    correct: bool | None


class EmbeddingMap(StrictModel):
    """A map of the features at `tap`. `explained` are the shares of the variance of the two axes, for PCA only.

    `neighbour_agreement` is the share of the five nearest neighbours by cosine that have the label of their sample.
    """

    method: MapMethod
    tap: str
    classes: list[str]
    explained: tuple[float, float] | None
    neighbour_agreement: float | None
    points: list[MapPoint]


def place_points(
    features_ND: NDArray[Any], method: MapMethod, seed: int
) -> tuple[NDArray[np.float64], tuple[float, float] | None]:
    """The points_N2 of a method, and what PCA's axes explain. ConfigError without the package that it needs."""
    if method is MapMethod.PCA:
        found = pca_map(features_ND)
        return found.points_N2, found.explained
    points_N2: NDArray[np.float64] = (
        _umap()
        .UMAP(
            n_components=2,
            # It cannot have more neighbours than other points.
            n_neighbors=min(15, len(features_ND) - 1),
            metric="cosine",
            random_state=seed,
            n_jobs=1,
        )
        .fit_transform(np.asarray(features_ND, np.float32))
    )
    return points_N2.astype(np.float64), None


def require_method(method: MapMethod) -> None:
    """Raise ConfigError if a map cannot be made here: before a job begins."""
    if method is MapMethod.UMAP:
        _umap()


def neighbour_agreement(features_ND: NDArray[Any], labels_N: NDArray[np.int64]) -> float | None:
    """The share of nearest neighbours with the same label, over samples that have one (-1 is none), or None."""
    labelled = labels_N >= 0
    if labelled.sum() <= _AGREEMENT_NEIGHBOURS:
        return None
    own_N = labels_N[labelled]
    near = nearest_neighbours(features_ND[labelled], _AGREEMENT_NEIGHBOURS)
    return float((own_N[near.rows_NK] == own_N[:, None]).mean())


def _umap() -> Any:
    try:
        # Numba compiles for seconds as it is imported.
        import umap  # noqa: PLC0415
    except ImportError:
        raise ConfigError(
            "the map 'umap' needs the package umap-learn",
            where="embedding.methods",
            next_step="pip install 'convoy-vision[maps]', or leave it at [pca]",
        ) from None
    return umap
