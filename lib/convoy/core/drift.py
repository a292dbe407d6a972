"""How far new data lies from old data: shifts of embeddings and of class counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convoy.core.config import StrictModel
from convoy.core.errors import DataError


class EmbeddingShift(StrictModel):
    """The distance of new embeddings from old ones, in units of the old ones' spread.

    `by_chance` is about what two samples of these sizes from one distribution would give.
    """

    shift: float
    by_chance: float


def embedding_shift(new_ND: NDArray[Any], old_ND: NDArray[Any]) -> EmbeddingShift:
    """The Fréchet distance of two sets of rows, taken as Gaussians of diagonal covariance.

    That is the root of d^2 in eq. 6 of Heusel et al. 2017, where `transferability.frechet_distance` is d^2 itself. It
    is divided by the total standard deviation of the old rows: 1 means that the means lie as far apart as an old row
    lies from its mean. Raises DataError for fewer than two old rows or no new one.
    """
    new, old = np.asarray(new_ND, np.float64), np.asarray(old_ND, np.float64)
    if len(new) < 1 or len(old) < 2:
        raise DataError(
            "a shift needs new rows and at least two old ones", where=f"{len(new)} and {len(old)}"
        )
    spread = float(old.var(axis=0).sum())
    if spread == 0.0:
        raise DataError("the old embeddings are all the same, so no distance has a unit")
    of_means = float(np.square(new.mean(axis=0) - old.mean(axis=0)).sum())
    # The standard deviation of one row says nothing.
    of_spreads = float(np.square(new.std(axis=0) - old.std(axis=0)).sum()) if len(new) > 1 else 0.0
    return EmbeddingShift(
        shift=float(np.sqrt((of_means + of_spreads) / spread)),
        # The means contribute 1/n each, standard deviations of normal features half as much.
        by_chance=float(np.sqrt(1.5 * (1.0 / len(new) + 1.0 / len(old)))),
    )


def class_shift(new: Mapping[str, int], old: Mapping[str, int]) -> float:
    """The total variation distance of two distributions of classes, from counts: 0 = equal, 1 = disjoint.

    0 where one of them has no row.
    """
    total_new, total_old = sum(new.values()), sum(old.values())
    if not total_new or not total_old:
        return 0.0
    names = new.keys() | old.keys()
    gaps = (abs(new.get(name, 0) / total_new - old.get(name, 0) / total_old) for name in names)
    return sum(gaps) / 2.0
