"""Splits named by a source, and splits drawn by hash."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convoy.core.config import parse_config
from convoy.core.records import Split
from convoy.core.splits import SplitOptions, draw_split, parse_split
from convoy.pipelines.cache import CacheConfig
from convoy.pipelines.evaluate import EvaluateConfig
from convoy.pipelines.inspect_config import InspectConfig
from convoy.pipelines.score_config import ScoreConfig

IDS = [f"cat/{index:05d}.jpg" for index in range(20_000)]


def test_fractions_are_what_was_asked_within_four_deviations() -> None:
    options = SplitOptions(val_fraction=0.1, test_fraction=0.2)
    drawn = [draw_split(sample_id, options) for sample_id in IDS]
    assert abs(drawn.count(Split.VAL) - 2000) < 4 * (20_000 * 0.1 * 0.9) ** 0.5
    assert abs(drawn.count(Split.TEST) - 4000) < 4 * (20_000 * 0.2 * 0.8) ** 0.5


def test_another_seed_draws_other_samples() -> None:
    first = [draw_split(sample_id, SplitOptions(seed=0)) for sample_id in IDS[:1000]]
    assert first != [draw_split(sample_id, SplitOptions(seed=1)) for sample_id in IDS[:1000]]


def test_a_draw_never_changes_between_releases() -> None:
    drawn = [
        draw_split(f"sample-{index}", SplitOptions(val_fraction=0.3, test_fraction=0.3)) for index in range(8)
    ]
    assert [split.value for split in drawn] == [
        "train",
        "test",
        "val",
        "train",
        "train",
        "train",
        "val",
        "val",
    ]


def test_a_larger_val_takes_from_train_and_moves_nothing_else() -> None:
    small, large = SplitOptions(val_fraction=0.1), SplitOptions(val_fraction=0.3)
    for sample_id in IDS[:2000]:
        before, after = draw_split(sample_id, small), draw_split(sample_id, large)
        assert before is after or (before, after) == (Split.TRAIN, Split.VAL)


@given(st.text(), st.integers(min_value=0))
def test_fractions_of_zero_leave_train_whole(sample_id: str, seed: int) -> None:
    assert draw_split(sample_id, SplitOptions(val_fraction=0, test_fraction=0, seed=seed)) is Split.TRAIN


def test_a_split_that_the_source_names_is_not_drawn() -> None:
    options = SplitOptions(val_fraction=0.5, test_fraction=0.4).given({Split.TRAIN, Split.TEST})
    assert {draw_split(sample_id, options) for sample_id in IDS[:200]} == {Split.TRAIN, Split.VAL}


def test_nothing_left_for_train_is_refused() -> None:
    with pytest.raises(ValueError, match="less than 1"):
        SplitOptions(val_fraction=0.5, test_fraction=0.5)


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        (CacheConfig, {"backbone": {"arch": "lenet5"}}),
        (EvaluateConfig, {"bundle": "one"}),
        (InspectConfig, {"bundle": "one"}),
        (ScoreConfig, {"bundle": "one"}),
    ],
)
def test_a_split_that_a_config_names_twice_is_meant_once(
    model: type[CacheConfig | EvaluateConfig | InspectConfig | ScoreConfig], settings: dict[str, Any]
) -> None:
    named = {**settings, "dataset": "digits", "splits": ["test", "train", "test"]}
    assert parse_config(model, named, where="here").splits == (Split.TEST, Split.TRAIN)


@pytest.mark.parametrize(
    ("word", "split"),
    [
        ("train", Split.TRAIN),
        ("Valid", Split.VAL),
        ("validation", Split.VAL),
        ("TEST", Split.TEST),
        ("cat", None),
    ],
)
def test_split_words(word: str, split: Split | None) -> None:
    assert parse_split(word) is split
