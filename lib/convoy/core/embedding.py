"""Features as points: a map of them in two dimensions, who is near whom, and which are the same picture twice.

Everything goes block by block: beside the features and what comes back, a few tens of megabytes are in memory.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convoy.core.config import StrictModel
from convoy.core.errors import ConfigError, DataError

# Chosen on planted duplicates of three data sets: see tests/benchmarks/near_duplicates.py.
NEAR_DUPLICATE_THRESHOLD = 0.35
# So like each other that it does not matter how crowded their surroundings are: then a picture that is there more
# often than a row has neighbours is found as well.
_CERTAIN_SIMILARITY = 0.95
_NUM_NEIGHBOURS = 10
_MAX_COMPONENTS = 128
_ROWS_A_COMPONENT = 2
# Deviations below this share of the largest are rounding of stored features.
_MIN_DEVIATION = 1e-3
_BLOCK_ROWS = 2048
_MIN_ROWS = 3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PcaMap:
    """Points in the plane of the two largest principal components; `explained` are their shares of the variance."""

    points_N2: NDArray[np.float64]
    explained: tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Neighbours:
    """The nearest other rows of each row, the nearest first, and their cosine similarities in -1..1."""

    rows_NK: NDArray[np.int64]
    similarities_NK: NDArray[np.float32]


class DuplicateGroup(StrictModel):
    """Samples that show one picture, in the order of their rows.

    `score` is that of the weakest link: by how much its cosine is above what is usual around it, at least the
    threshold; or the cosine itself where that is 0.95 or more.
    """

    sample_ids: tuple[str, ...]
    score: float


class NearDuplicates(StrictModel):
    """Groups of near duplicates, the surest first; `samples` counts those that were compared."""

    threshold: float
    samples: int
    groups: tuple[DuplicateGroup, ...]


def pca_map(features_ND: NDArray[Any]) -> PcaMap:
    """A map of rows by principal component analysis, through a singular value decomposition in float64.

    Signs are free in PCA: here the largest loading of each component is positive, so equal features give equal maps.
    Raises DataError for fewer than three rows.
    """
    centred_ND = _checked(features_ND).astype(np.float64)
    centred_ND -= centred_ND.mean(axis=0)
    left_NR, deviations_R, loadings_RD = np.linalg.svd(centred_ND, full_matrices=False)
    missing = max(0, 2 - len(deviations_R))
    signs_R = np.sign(loadings_RD[np.arange(len(loadings_RD)), np.abs(loadings_RD).argmax(axis=1)])
    points_NR = left_NR * (deviations_R * np.where(signs_R == 0, 1, signs_R))
    variances_R = np.pad(np.square(deviations_R), (0, missing))
    total = float(variances_R.sum()) or 1.0
    return PcaMap(
        points_N2=np.pad(points_NR, ((0, 0), (0, missing)))[:, :2],
        explained=(float(variances_R[0]) / total, float(variances_R[1]) / total),
    )


def nearest_neighbours(
    features_ND: NDArray[Any], num_neighbours: int, *, block_rows: int = _BLOCK_ROWS
) -> Neighbours:
    """The rows with the largest cosine similarity to each row, itself left out.

    Exact, in time that grows with the square of the rows. Raises ConfigError for more neighbours than other rows.
    """
    num_rows = len(_checked(features_ND))
    if not 1 <= num_neighbours < num_rows:
        raise ConfigError(
            f"{num_rows} rows have no {num_neighbours} neighbours each",
            next_step=f"ask for 1 to {num_rows - 1}",
        )
    unit_ND = unit_rows(features_ND)
    found = [
        _nearest_of_block(
            unit_ND, slice(start, min(start + block_rows, num_rows)), num_neighbours, block_rows
        )
        for start in range(0, num_rows, block_rows)
    ]
    return Neighbours(
        rows_NK=np.concatenate([rows_BK for rows_BK, _ in found]),
        similarities_NK=np.concatenate([similarities_BK for _, similarities_BK in found]),
    )


def unit_rows(features_ND: NDArray[Any]) -> NDArray[np.float32]:
    """Rows of length 1, however small or large they were; those of zeros stay."""
    unit_ND = np.array(features_ND, np.float32)
    # Squares of features would leave the range of float32 long before the features do.
    largest_N1 = np.maximum(unit_ND.max(axis=1, keepdims=True), -unit_ND.min(axis=1, keepdims=True))
    unit_ND /= np.where(largest_N1 > 0, largest_N1, 1)
    unit_ND /= np.maximum(np.linalg.norm(unit_ND, axis=1, keepdims=True), 1)
    return unit_ND


def find_near_duplicates(
    features_ND: NDArray[Any], sample_ids: Sequence[str], threshold: float = NEAR_DUPLICATE_THRESHOLD
) -> NearDuplicates:
    """Samples that show the same picture: compressed again, resized or cropped.

    Features are whitened by PCA (Jégou and Chum, ECCV 2012, section 3.2), which takes away what all images share. Two
    rows are near duplicates if their cosine there is at least `threshold` above the mean of their two similarities
    to their tenth neighbour: how crowded it is differs between data sets, and inside one (CSLS of Conneau et al., ICLR
    2018, equation 2, with the tenth neighbour in place of a mean). Nor may chance reach their cosine: few features
    tell few images apart. Links join to groups. More than ten loose copies of one picture hide each other, close ones
    do not. Best on pooled maps of several depths beside each other; those of the deepest layers alone cannot tell two
    images of a class apart. Raises DataError for fewer than three rows, and for features that are all the same.
    """
    whitened_NC = whiten(features_ND)
    num_rows = len(whitened_NC)
    near = nearest_neighbours(whitened_NC, min(_NUM_NEIGHBOURS, num_rows - 1))
    crowding_N = near.similarities_NK[:, -1]
    # Above the mean of two crowdings a pair is above the lower one: so no pair is missed among the neighbours.
    margins_NK = near.similarities_NK - (crowding_N[:, None] + crowding_N[near.rows_NK]) / 2
    certain_NK = near.similarities_NK >= _CERTAIN_SIMILARITY
    beyond_chance_NK = near.similarities_NK >= _by_chance(whitened_NC.shape)
    scores_NK = np.where(certain_NK, near.similarities_NK, margins_NK)
    first_P, place_P = np.nonzero(certain_NK | (beyond_chance_NK & (margins_NK >= threshold)))
    links = zip(
        first_P.tolist(),
        near.rows_NK[first_P, place_P].tolist(),
        scores_NK[first_P, place_P].tolist(),
        strict=True,
    )
    groups = [
        DuplicateGroup(sample_ids=tuple(sample_ids[row] for row in rows), score=score)
        for rows, score in _joined(links)
    ]
    return NearDuplicates(
        threshold=threshold,
        samples=num_rows,
        groups=tuple(sorted(groups, key=lambda group: (-group.score, group.sample_ids))),
    )


def whiten(features_ND: NDArray[Any]) -> NDArray[np.float32]:
    """Rows in their principal components, each scaled to deviation 1, largest first.

    At most 128 of them, and one for every two rows: whitened by as many components as there are rows, all rows would
    be equally far from each other. Raises DataError for fewer than three rows, and where all rows are equal.
    """
    num_rows, num_features = _checked(features_ND).shape
    mean_D = features_ND.mean(axis=0, dtype=np.float64)
    covariance_DD = np.zeros((num_features, num_features))
    for block_BD in _blocks(features_ND):
        centred_BD = block_BD - mean_D
        covariance_DD += centred_BD.T @ centred_BD
    variances_D, components_DD = np.linalg.eigh(covariance_DD / num_rows)
    deviations_D = np.sqrt(np.maximum(variances_D[::-1], 0))
    if not deviations_D[0]:
        raise DataError(
            "the features of all images are the same",
            next_step="look at what the network makes of them, or take another tap",
        )
    num_usable = int((deviations_D > _MIN_DEVIATION * deviations_D[0]).sum())
    num_components = min(num_usable, _MAX_COMPONENTS, max(num_rows // _ROWS_A_COMPONENT, 2))
    basis_DC = components_DD[:, ::-1][:, :num_components] / deviations_D[:num_components]
    return np.concatenate(
        [((block_BD - mean_D) @ basis_DC).astype(np.float32) for block_BD in _blocks(features_ND)]
    )


def _by_chance(shape: tuple[int, ...]) -> float:
    """About the largest cosine of all pairs of so many random directions: each is normal with deviation C^-1/2."""
    num_rows, num_components = shape
    return min(math.sqrt(2 * math.log(num_rows * (num_rows - 1) / 2) / num_components), _CERTAIN_SIMILARITY)


def _blocks(features_ND: NDArray[Any]) -> Iterator[NDArray[np.float64]]:
    for start in range(0, len(features_ND), _BLOCK_ROWS):
        yield features_ND[start : start + _BLOCK_ROWS].astype(np.float64)


def _nearest_of_block(
    unit_ND: NDArray[np.float32], rows: slice, num_neighbours: int, block_rows: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The neighbours of some rows: the best of what is known and of the next block, block after block."""
    num_own = rows.stop - rows.start
    best_rows_BK = np.empty((num_own, 0), np.int64)
    best_BK = np.empty((num_own, 0), np.float32)
    for start in range(0, len(unit_ND), block_rows):
        similarities_BC = unit_ND[rows] @ unit_ND[start : start + block_rows].T
        if start == rows.start:
            np.fill_diagonal(similarities_BC, -np.inf)
        places_BK = _largest(similarities_BC, num_neighbours)
        known_BC = np.concatenate([best_BK, np.take_along_axis(similarities_BC, places_BK, axis=1)], axis=1)
        known_rows_BC = np.concatenate([best_rows_BK, start + places_BK], axis=1)
        places_BK = _largest(known_BC, num_neighbours)
        best_BK = np.take_along_axis(known_BC, places_BK, axis=1)
        best_rows_BK = np.take_along_axis(known_rows_BC, places_BK, axis=1)
    return best_rows_BK, np.clip(best_BK, -1, 1)


def _largest(values_BC: NDArray[np.float32], number: int) -> NDArray[np.int64]:
    """The places of the largest values of each row, the largest first."""
    num_values = values_BC.shape[1]
    if num_values > number:
        places_BK = np.argpartition(values_BC, num_values - number, axis=1)[:, num_values - number :]
        places_BK.sort(axis=1)
    else:
        places_BK = np.broadcast_to(np.arange(num_values), values_BC.shape)
    order_BK = np.argsort(-np.take_along_axis(values_BC, places_BK, axis=1), axis=1, kind="stable")
    return np.take_along_axis(places_BK, order_BK, axis=1)


def _joined(links: Iterator[tuple[int, int, float]]) -> Iterator[tuple[list[int], float]]:
    """The groups of rows that links join, and the lowest score in each."""
    leader: dict[int, int] = {}

    def leader_of(row: int) -> int:
        while leader.setdefault(row, row) != row:
            leader[row] = leader[leader[row]]
            row = leader[row]
        return row

    scores: list[tuple[int, float]] = []
    for first, second, score in links:
        low, high = sorted((leader_of(first), leader_of(second)))
        leader[high] = low
        scores.append((first, score))
    rows_of, lowest = defaultdict[int, list[int]](list), dict[int, float]()
    for row in sorted(leader):
        rows_of[leader_of(row)].append(row)
    for row, score in scores:
        group = leader_of(row)
        lowest[group] = min(score, lowest.get(group, score))
    for group, rows in rows_of.items():
        yield rows, lowest[group]


def _checked(features_ND: NDArray[Any]) -> NDArray[Any]:
    if features_ND.ndim != 2 or len(features_ND) < _MIN_ROWS:
        raise DataError(
            "a map, and neighbours, need three images or more", where=f"features of shape {features_ND.shape}"
        )
    return features_ND
