"""A sample of labelled rows in which classes have the shares that they have, and a few rows at least."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from convoy.pipelines.training_rows import first_of_class


def natural_rows(rows: pa.Table, most: int, *, num_classes: int, seed: int = 0) -> pa.Table:
    """At most so many labelled rows, each class with its share; which of it is up to a hash of sample id and seed."""
    counts_K = np.bincount(rows["label"].to_numpy(), minlength=num_classes)
    return first_of_class(rows, natural_counts(counts_K, most, least=0), seed=seed)


def natural_counts(
    counts_K: Sequence[int] | NDArray[np.int64], most: int, *, least: int
) -> NDArray[np.int64]:
    """How many rows of each class a sample of `most` has, where there are `counts_K`: its share, to within one row.

    A class whose share is less has `least`, or all that there are, at the expense of the others. `most` must hold
    these. Small classes together have their share too: of a hundred with half a row each, every second has one.
    """
    counts_K = np.asarray(counts_K, np.int64)
    if counts_K.sum() <= most:
        return counts_K
    least_K = np.minimum(counts_K, least)
    is_raised_K = np.zeros(len(counts_K), np.bool_)
    while True:
        rate = (most - least_K[is_raised_K].sum()) / counts_K[~is_raised_K].sum()
        is_below_K = ~is_raised_K & (rate * counts_K < least_K)
        if not is_below_K.any():
            break
        is_raised_K |= is_below_K
    shares_K = np.diff(np.floor(np.cumsum(np.where(is_raised_K, 0, rate * counts_K)) + 0.5), prepend=0)
    return np.where(is_raised_K, least_K, shares_K.astype(np.int64))


def natural_weights(counts_K: NDArray[np.int64], sampled_K: NDArray[np.int64]) -> NDArray[np.float64]:
    """The weight of a sampled row of each class that makes it stand for the rows that there are: 1 on average.

    Exactly 1 where the sample has the same share of each class; 0 for a class without rows.
    """
    stands_for_K = np.divide(counts_K, sampled_K, out=np.zeros(len(counts_K)), where=sampled_K > 0)
    weights_K: NDArray[np.float64] = stands_for_K / (counts_K.sum() / sampled_K.sum())
    return weights_K
