from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from convoy.core.confusions import pair_rises
from convoy.core.errors import DataError

# Twenty rows of each of three classes, all right at first.
LABELS_N = np.repeat([0, 1, 2], 20)


def after(*changes: tuple[int, int, int]) -> np.ndarray:
    """The labels, but for so many rows of a class that are taken for another one: (label, other, rows)."""
    predicted_N = LABELS_N.copy()
    for label, other, num_rows in changes:
        predicted_N[np.flatnonzero(label == LABELS_N)[:num_rows]] = other
    return predicted_N


def test_errors_in_both_directions_count_for_a_pair() -> None:
    (rise,) = pair_rises(LABELS_N, LABELS_N, after((0, 1, 6), (1, 0, 5)))
    assert (rise.first, rise.second, rise.num_rows) == (0, 1, 40)
    assert (rise.before, rise.after) == (0, 11)
    assert (rise.forward_share, rise.backward_share) == (0.3, 0.25)
    # Eleven errors began and none ended: half of the chance of just that.
    assert rise.p == pytest.approx(0.5**12)
    assert rise.p_each == pytest.approx(0.5**6)


def test_a_pair_that_errs_one_way_only_rose_but_not_each_way() -> None:
    (rise,) = pair_rises(LABELS_N, LABELS_N, after((2, 1, 8)))
    assert (rise.first, rise.second, rise.forward_share, rise.backward_share) == (1, 2, 0.0, 0.4)
    assert rise.p < 0.01
    assert rise.p_each == 0.5


def test_pairs_that_rose_most_come_first_and_untouched_ones_do_not_come() -> None:
    rises = pair_rises(LABELS_N, LABELS_N, after((0, 2, 2), (1, 2, 7)))
    assert [(rise.first, rise.second) for rise in rises] == [(1, 2), (0, 2)]
    assert pair_rises(LABELS_N, LABELS_N, LABELS_N) == []


def test_errors_that_end_speak_against_those_that_begin() -> None:
    before_N, after_N = LABELS_N.copy(), LABELS_N.copy()
    before_N[:4], after_N[4:9] = 1, 1
    (rise,) = pair_rises(LABELS_N, before_N, after_N)
    assert (rise.before, rise.after) == (4, 5)
    tail = stats.binom.cdf(4, 9, 0.5) - stats.binom.pmf(4, 9, 0.5) / 2
    assert rise.p == pytest.approx(tail)


def test_other_rows_are_refused() -> None:
    with pytest.raises(DataError, match="the same rows"):
        pair_rises(LABELS_N, LABELS_N[1:], LABELS_N)
