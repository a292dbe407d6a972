"""Samples have the classes' own shares, a few rows of each at least, and weights that say what a row stands for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from convoy.core.records import Split
from convoy.pipelines.natural_sample import natural_counts, natural_rows, natural_weights
from convoy.pipelines.training_rows import RowLimit, read_split
from made_advice_rows import frozen_rows


@pytest.mark.parametrize(
    ("counts", "most", "least", "sampled"),
    [
        ([9000, 600, 400], 600, 4, [540, 36, 24]),
        ([300, 300, 300], 600, 4, [200, 200, 200]),
        ([30, 20, 10], 60, 4, [30, 20, 10]),
        # What small classes have too much is taken from the others, by their shares.
        ([8000, 1990, 10], 104, 4, [80, 20, 4]),
        ([9990, 8, 2], 100, 4, [94, 4, 2]),
        # Each has half a row.
        ([50, *[1] * 10], 30, 0, [25, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0]),
    ],
)
def test_classes_have_their_share_or_a_few_rows(
    counts: list[int], most: int, least: int, sampled: list[int]
) -> None:
    assert natural_counts(counts, most, least=least).tolist() == sampled


def test_a_sample_is_never_larger_than_asked_nor_a_class_larger_than_it_is() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        counts_K = (random.pareto(0.7, size=random.integers(2, 40)) * 10).astype(np.int64) + 1
        most = int(random.integers(np.minimum(counts_K, 4).sum(), counts_K.sum() + 10))
        sampled_K = natural_counts(counts_K, most, least=4)
        assert sampled_K.sum() == min(most, counts_K.sum())
        assert (sampled_K <= counts_K).all()
        assert (sampled_K >= np.minimum(counts_K, 4)).all()


def test_weights_give_classes_their_shares_back_and_are_one_where_those_are_kept() -> None:
    counts_K, sampled_K = np.array([8000, 1990, 10]), np.array([80, 20, 4])
    weights_K = natural_weights(counts_K, sampled_K)
    assert weights_K * sampled_K / 104 == pytest.approx(counts_K / 10_000)
    assert natural_weights(np.array([900, 300, 0]), np.array([30, 10, 0])).tolist() == [1, 1, 0]


def test_of_even_classes_those_rows_are_taken_that_a_limit_would_leave(tmp_path: Path) -> None:
    manifest = frozen_rows(tmp_path, {Split.TRAIN: (50, 50, 50)}, ("a", "b", "c"))
    sampled = natural_rows(read_split(manifest, Split.TRAIN), 60, num_classes=3, seed=7)
    assert sampled == read_split(manifest, Split.TRAIN, RowLimit(max_per_class=20, seed=7))
