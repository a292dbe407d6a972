"""Shifts of embeddings and classes: known distances, and what chance alone gives."""

from __future__ import annotations

import numpy as np
import pytest

from convoy.core.drift import class_shift, embedding_shift
from convoy.core.errors import DataError


def test_the_shift_of_a_moved_gaussian_is_its_distance_in_spreads() -> None:
    random = np.random.default_rng(0)
    old_ND = random.normal(size=(20_000, 8))
    new_ND = random.normal(size=(20_000, 8)) + 0.5
    # Each of 8 dimensions moves by half its standard deviation: sqrt(8 * 0.25 / 8).
    assert embedding_shift(new_ND, old_ND).shift == pytest.approx(0.5, abs=0.02)


def test_a_wider_spread_is_a_shift_too() -> None:
    random = np.random.default_rng(1)
    found = embedding_shift(3 * random.normal(size=(20_000, 4)), random.normal(size=(20_000, 4)))
    assert found.shift == pytest.approx(2.0, abs=0.05)


def test_samples_of_one_distribution_are_about_as_far_apart_as_chance_says() -> None:
    shifts = []
    for seed in range(20):
        random = np.random.default_rng(seed)
        found = embedding_shift(random.normal(size=(50, 64)), random.normal(size=(500, 64)))
        shifts.append(found.shift / found.by_chance)
    assert np.mean(shifts) == pytest.approx(1.0, abs=0.1)


def test_rows_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(DataError, match="needs new rows"):
        embedding_shift(np.zeros((0, 3)), np.zeros((5, 3)))
    with pytest.raises(DataError, match="all the same"):
        embedding_shift(np.ones((5, 3)), np.zeros((5, 3)))


@pytest.mark.parametrize(
    ("new", "old", "shift"),
    [
        ({"a": 5, "b": 5}, {"a": 50, "b": 50}, 0.0),
        ({"a": 5}, {"b": 50}, 1.0),
        ({"a": 10}, {"a": 50, "b": 50}, 0.5),
        ({}, {"a": 1}, 0.0),
    ],
)
def test_the_shift_of_classes_is_their_total_variation(
    new: dict[str, int], old: dict[str, int], shift: float
) -> None:
    assert class_shift(new, old) == pytest.approx(shift)
