from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convoy.core.pareto import dominators, front_places

POINTS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12)


def test_front_holds_what_no_cheaper_point_reaches() -> None:
    costs, values = [4.0, 1.0, 2.0, 3.0, 5.0], [0.9, 0.5, 0.4, 0.7, 0.9]
    assert front_places(costs, values) == [1, 3, 0]
    # Point 2 costs more than 1 and brings less; 4 costs more than 0 and brings the same.
    assert dominators(costs, values) == [None, None, 1, None, 0]


def test_of_equal_points_the_first_counts() -> None:
    assert front_places([1.0, 1.0, 1.0], [0.5, 0.6, 0.6]) == [1]
    assert dominators([1.0, 1.0, 1.0], [0.5, 0.6, 0.6]) == [1, None, 1]


def test_nothing_has_no_front() -> None:
    assert front_places([], []) == []
    assert dominators([], []) == []


@given(POINTS)
def test_a_point_is_on_the_front_or_dominated_by_one_of_it(points: list[tuple[int, int]]) -> None:
    costs, values = zip(*points, strict=True)
    front = front_places(costs, values)
    for place, better in enumerate(dominators(costs, values)):
        assert (better is None) == (place in front)
        if better is not None:
            assert better in front
            assert costs[better] <= costs[place]
            assert values[better] >= values[place]
            # No other that costs no more is worth more.
            assert values[better] == max(
                value for cost, value in zip(costs, values, strict=True) if cost <= costs[place]
            )


@given(POINTS)
def test_costs_and_values_ascend_along_the_front(points: list[tuple[int, int]]) -> None:
    costs, values = zip(*points, strict=True)
    front = front_places(costs, values)
    for series in ([costs[place] for place in front], [values[place] for place in front]):
        assert list(series) == sorted(set(series))
    assert values[front[-1]] == pytest.approx(max(values))
