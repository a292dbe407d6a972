"""What features say of labels without any training: k nearest neighbours, LogME, and distances between domains."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from convoy.core.config import StrictModel
from convoy.core.embedding import unit_rows
from convoy.core.errors import DataError

Floats = NDArray[np.float64]

_QUERIES_PER_BLOCK = 1024
_LOGME_ROUNDS = 11
_LOGME_TOLERANCE = 1e-3
# Below the least difference in votes, so that similarity only breaks ties.
_TIE_BREAK = 1e-3


class DomainDistance(StrictModel):
    """How far two sets of features are apart.

    `frechet` is the squared Fréchet distance of the Gaussians with their means and covariances (d^2 of Heusel et al.
    2017, arXiv:1706.08500, eq. 6: FID is this on Inception's features), in squared units of the features;
    `relative` divides it by the total variance of the reference. The fewer the images, the larger it is by chance
    alone, so `within_reference`, the relative distance between two halves of the reference, is what no difference
    at all looks like beside `relative_at_half`: that from as many images to one of these halves. That is null in
    advice from before it was measured.
    """

    reference: str
    tap: str
    frechet: float
    relative: float
    within_reference: float
    relative_at_half: float | None = None


def knn_correct(
    train_ND: NDArray[Any],
    train_labels_N: NDArray[Any],
    features_MD: NDArray[Any],
    labels_M: NDArray[Any],
    *,
    num_neighbours: int = 5,
    weights_N: NDArray[Any] | None = None,
) -> NDArray[np.bool_]:
    """For each row whether the majority of its nearest train rows by cosine has its label; ties go to the nearer.

    `weights_N` are the votes of each train row, by default one.
    """
    if not len(train_ND) or train_ND.shape[1:] != features_MD.shape[1:]:
        raise DataError(
            "neighbours need train rows of the same features",
            where=f"{train_ND.shape} and {features_MD.shape}",
        )
    num_neighbours = min(num_neighbours, len(train_ND))
    num_classes = int(max(train_labels_N.max(), labels_M.max())) + 1
    train = unit_rows(train_ND)
    found = []
    for start in range(0, len(features_MD), _QUERIES_PER_BLOCK):
        similarity_MN = unit_rows(features_MD[start : start + _QUERIES_PER_BLOCK]) @ train.T
        nearest_MK = np.argpartition(-similarity_MN, num_neighbours - 1, axis=1)[:, :num_neighbours]
        votes_MK = 1 + _TIE_BREAK * np.take_along_axis(similarity_MN, nearest_MK, axis=1)
        if weights_N is not None:
            votes_MK *= weights_N[nearest_MK]
        votes_MC = np.zeros((len(similarity_MN), num_classes))
        rows_M1 = np.arange(len(similarity_MN))[:, None]
        np.add.at(votes_MC, (rows_M1, train_labels_N[nearest_MK]), votes_MK)
        found.append(votes_MC.argmax(axis=1))
    correct_M: NDArray[np.bool_] = np.concatenate(found) == labels_M
    return correct_M


def logme(features_ND: NDArray[Any], labels_N: NDArray[Any]) -> float | None:
    """The mean log evidence of one linear model a class on the features, for each row; larger is better.

    You et al. 2021 (arXiv:2102.11005), with the fixed point of You et al. 2022 (arXiv:2110.10545, algorithm 3).
    It compares feature sets on the same labels, whatever their scale, and says nothing by itself. None where all rows
    have the same features.
    """
    features = np.asarray(features_ND, np.float64)
    num_rows, num_features = features.shape
    if num_rows < 2 or len(labels_N) != num_rows:
        raise DataError("the evidence needs rows with labels", where=f"{features.shape}, {len(labels_N)}")
    if not np.ptp(features, axis=0).any():
        return None
    # The evidence knows no scale, but its fixed point has constants that are small beside features of about 1 only.
    left_NK, singular_K, _ = np.linalg.svd(features / np.abs(features).max(), full_matrices=False)
    evidences = [
        _log_evidence(left_NK, singular_K**2, (labels_N == label).astype(np.float64), num_features)
        for label in np.unique(labels_N)
    ]
    return float(np.mean(evidences))


def _log_evidence(left_NK: Floats, variance_K: Floats, target_N: Floats, num_features: int) -> float:
    num_rows = len(target_N)
    projected_K = (left_NK.T @ target_N) ** 2
    outside = float(target_N @ target_N - projected_K.sum())
    alpha = beta = 1.0
    weight_norm = residual = 0.0
    for _ in range(_LOGME_ROUNDS):
        ratio = alpha / beta
        effective = float((variance_K / (variance_K + ratio)).sum())
        weight_norm = float((variance_K * projected_K / (variance_K + ratio) ** 2).sum())
        residual = float((projected_K / (1 + variance_K / ratio) ** 2).sum()) + max(outside, 0.0)
        alpha = effective / (weight_norm + 1e-12)
        beta = (num_rows - effective) / (residual + 1e-12)
        if abs(alpha / beta - ratio) <= _LOGME_TOLERANCE * ratio:
            break
    log_determinant = float(np.log(alpha + beta * variance_K).sum())
    log_determinant += (num_features - len(variance_K)) * np.log(alpha)
    evidence = num_features * np.log(alpha) + num_rows * np.log(beta) - log_determinant
    evidence -= beta * residual + alpha * weight_norm + num_rows * np.log(2 * np.pi)
    return float(evidence / 2 / num_rows)


def domain_distance(
    features_ND: NDArray[Any], reference_MD: NDArray[Any], *, reference: str, tap: str
) -> DomainDistance:
    """The distance of features to those of a reference domain; DataError for fewer than four rows of either."""
    if min(len(features_ND), len(reference_MD)) < 4:
        raise DataError(
            f"a distance between domains needs four rows of each, not {len(features_ND)} and {len(reference_MD)}",
            where=reference,
        )
    total = float(np.asarray(reference_MD, np.float64).var(axis=0).sum()) or 1.0
    frechet = frechet_distance(features_ND, reference_MD)
    half, other_half = reference_MD[::2], reference_MD[1::2]
    # The bias of small samples goes with 1 / N: only equal numbers of rows can be compared.
    num_rows = min(len(features_ND), len(other_half))
    half, other_half, some = (_evenly(rows_ND, num_rows) for rows_ND in (half, other_half, features_ND))
    return DomainDistance(
        reference=reference,
        tap=tap,
        frechet=frechet,
        relative=frechet / total,
        within_reference=frechet_distance(half, other_half) / total,
        relative_at_half=frechet_distance(some, half) / total,
    )


def frechet_distance(first_ND: NDArray[Any], second_MD: NDArray[Any]) -> float:
    """The squared Fréchet distance of two sets of rows, taken as Gaussians; never below 0.

    That is d^2 = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Heusel et al. 2017, eq. 6), as FID is squared too.
    """
    first, second = np.asarray(first_ND, np.float64), np.asarray(second_MD, np.float64)
    gap_D = first.mean(axis=0) - second.mean(axis=0)
    first_DD, second_DD = np.atleast_2d(np.cov(first.T)), np.atleast_2d(np.cov(second.T))
    root_DD = _root(first_DD)
    # tr (S1 S2)^(1/2) = tr (S1^(1/2) S2 S1^(1/2))^(1/2), which is symmetric.
    shared = float(np.sqrt(np.maximum(np.linalg.eigvalsh(root_DD @ second_DD @ root_DD), 0.0)).sum())
    distance = float(gap_D @ gap_D) + float(np.trace(first_DD) + np.trace(second_DD)) - 2 * shared
    return max(distance, 0.0)


def _evenly(rows_ND: NDArray[Any], num_rows: int) -> NDArray[Any]:
    """So many of the rows, from all over them: they may be sorted by class."""
    return rows_ND[np.linspace(0, len(rows_ND) - 1, num_rows).round().astype(np.intp)]


def _root(matrix_DD: Floats) -> Floats:
    """The symmetric square root of a covariance."""
    values_D, vectors_DD = np.linalg.eigh(matrix_DD)
    root_DD: Floats = (vectors_DD * np.sqrt(np.maximum(values_D, 0.0))) @ vectors_DD.T
    return root_DD
