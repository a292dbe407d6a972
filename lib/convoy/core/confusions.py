"""Which classes are taken for one another more often than before, and whether that may be chance."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from convoy.core.config import StrictModel
from convoy.core.errors import DataError
from convoy.core.statistics import rise_test


class PairRise(StrictModel):
    """Two classes, and how many of their rows were taken for the other one: before, and after something changed.

    Forward are rows of the first class, backward those of the second. `num_rows` counts the rows of both. `p` is
    the one-sided mid-p value of the rise in both directions together; `p_each` the larger of those of each
    direction, which is small only if both rose.
    """

    first: int
    second: int
    num_rows: int
    before: int
    after: int
    forward_share: float
    backward_share: float
    p: float
    p_each: float


def pair_rises(labels_N: NDArray[Any], before_N: NDArray[Any], after_N: NDArray[Any]) -> list[PairRise]:
    """The pairs of classes of which a row changed, those that rose most first.

    `before_N` and `after_N` are the predicted classes of the same rows. Raises DataError if they are not.
    """
    if not labels_N.shape == before_N.shape == after_N.shape:
        raise DataError(
            "confusions can be compared on the same rows only",
            where=f"{labels_N.shape}, {before_N.shape} and {after_N.shape} rows",
        )
    changed = before_N != after_N
    touched = {
        (min(label, pred), max(label, pred))
        for predicted_N in (before_N, after_N)
        for label, pred in zip(labels_N[changed].tolist(), predicted_N[changed].tolist(), strict=True)
        if label != pred
    }
    rises = [_pair(labels_N, before_N, after_N, first, second) for first, second in touched]
    return sorted(rises, key=lambda rise: (rise.before - rise.after, rise.first, rise.second))


def _pair(
    labels_N: NDArray[Any], before_N: NDArray[Any], after_N: NDArray[Any], first: int, second: int
) -> PairRise:
    counts = [
        _direction(labels_N, before_N, after_N, label, other)
        for label, other in ((first, second), (second, first))
    ]
    begun, ended = (sum(one[name] for one in counts) for name in ("begun", "ended"))
    return PairRise(
        first=first,
        second=second,
        num_rows=sum(one["rows"] for one in counts),
        before=sum(one["before"] for one in counts),
        after=sum(one["after"] for one in counts),
        forward_share=counts[0]["after"] / max(counts[0]["rows"], 1),
        backward_share=counts[1]["after"] / max(counts[1]["rows"], 1),
        p=rise_test(begun, ended),
        p_each=max(rise_test(one["begun"], one["ended"]) for one in counts),
    )


def _direction(
    labels_N: NDArray[Any], before_N: NDArray[Any], after_N: NDArray[Any], label: int, other: int
) -> dict[str, int]:
    """Of the rows of a class: how many were and are taken for another, and how many began and ended to be."""
    rows = labels_N == label
    was, is_now = before_N[rows] == other, after_N[rows] == other
    return {
        "rows": int(np.count_nonzero(rows)),
        "before": int(np.count_nonzero(was)),
        "after": int(np.count_nonzero(is_now)),
        "begun": int(np.count_nonzero(is_now & ~was)),
        "ended": int(np.count_nonzero(was & ~is_now)),
    }
