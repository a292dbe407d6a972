from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convoy.core.epochs import EpochPlan, balanced_draw, even_share, repetitions, rows_by_class, shuffled
from convoy.core.errors import ConfigError

sizes = st.integers(min_value=1, max_value=400)


@st.composite
def plans(draw: st.DrawFn) -> EpochPlan:
    num_rows = draw(sizes)
    return EpochPlan(num_rows=num_rows, batch_size=draw(st.integers(min_value=1, max_value=num_rows)))


@given(plans(), st.integers(1, 9), st.integers(1, 5))
def test_an_epoch_has_every_row_once_whatever_workers_and_passes(
    plan: EpochPlan, num_workers: int, num_passes: int
) -> None:
    positions = []
    for step in range(plan.num_steps):
        batch = []
        for rank in range(num_workers):
            share = plan.share(step, rank=rank, num_workers=num_workers)
            passes = [even_share(len(share), num_passes, number) for number in range(num_passes)]
            batch += [share[position] for one in passes for position in one]
        assert batch == list(plan.batch(step))
        positions += batch
    assert positions == list(range(plan.num_rows))


@given(plans(), st.integers(1, 9))
def test_batches_and_shares_differ_by_one_row_at_most(plan: EpochPlan, num_workers: int) -> None:
    batches = [len(plan.batch(step)) for step in range(plan.num_steps)]
    assert max(batches) <= plan.batch_size
    assert max(batches) - min(batches) <= 1
    assert min(batches) == plan.smallest_batch
    for step in range(plan.num_steps):
        shares = [len(plan.share(step, rank=rank, num_workers=num_workers)) for rank in range(num_workers)]
        assert max(shares) - min(shares) <= 1


@pytest.mark.parametrize("batch_size", [0, -1, 11])
def test_a_batch_that_cannot_be_filled_is_an_error(batch_size: int) -> None:
    with pytest.raises(ConfigError, match="cannot be filled from 10 training rows"):
        EpochPlan(num_rows=10, batch_size=batch_size)


def test_the_order_is_a_permutation_that_depends_on_seed_and_epoch_only() -> None:
    orders = {(seed, epoch): shuffled(50, seed, epoch) for seed in range(3) for epoch in range(3)}
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert len({order.tobytes() for order in orders.values()}) == len(orders)
    assert np.array_equal(shuffled(50, 2, 1), orders[2, 1])


def test_the_order_is_that_of_earlier_versions() -> None:
    assert shuffled(8, 0, 0).tolist() == [2, 5, 7, 1, 4, 3, 0, 6]
    labels_N = np.array([2, 0, 0, 5, 0, 2, 0, 0])
    assert balanced_draw(labels_N, 0, 0).tolist() == [0, 3, 2, 5, 1, 3, 5, 3]


@given(st.lists(st.integers(0, 9), max_size=60))
def test_rows_by_class_holds_the_rows_of_every_class_in_ascending_order(labels: list[int]) -> None:
    labels_N = np.array(labels, np.int32)
    found = {label: rows.tolist() for label, rows in rows_by_class(labels_N).items()}
    assert list(found) == sorted(set(labels))
    assert found == {label: np.flatnonzero(labels_N == label).tolist() for label in set(labels)}


@given(st.lists(st.integers(0, 5), min_size=1, max_size=120), st.integers(0, 3), st.integers(0, 3))
@settings(max_examples=50)
def test_a_balanced_draw_gives_classes_equally_and_repeats_rows_only_after_all_others(
    labels: list[int], seed: int, epoch: int
) -> None:
    labels_N = np.array(labels)
    drawn = balanced_draw(labels_N, seed, epoch)
    assert len(drawn) == len(labels_N)
    by_class = Counter(labels_N[drawn].tolist())
    counts = [by_class[label] for label in set(labels)]
    assert max(counts) - min(counts) <= 1
    for label in set(labels):
        times = Counter(drawn[labels_N[drawn] == label].tolist())
        visits = [times[int(row)] for row in np.flatnonzero(labels_N == label)]
        assert max(visits) - min(visits) <= 1


@given(st.lists(st.integers(0, 5), max_size=50))
def test_repetitions_count_how_often_a_row_came_before(rows: list[int]) -> None:
    counted = [rows[:place].count(row) for place, row in enumerate(rows)]
    assert repetitions(np.array(rows, np.int64)).tolist() == counted


def test_a_balanced_draw_depends_on_seed_and_epoch_and_mixes_the_classes() -> None:
    labels_N = np.repeat([0, 1, 2], [60, 30, 10])
    first = balanced_draw(labels_N, 0, 0)
    assert np.array_equal(first, balanced_draw(labels_N, 0, 0))
    assert not np.array_equal(first, balanced_draw(labels_N, 0, 1))
    assert not np.array_equal(first, balanced_draw(labels_N, 1, 0))
    assert all(set(labels_N[first[start : start + 25]]) == {0, 1, 2} for start in range(0, 100, 25))
