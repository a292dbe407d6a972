"""Splits that a source names, and splits that we make: a pure hash of the sample, so that rows never move."""

from __future__ import annotations

from collections.abc import Set
from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from convoy.core.config import StrictModel, parse_config
from convoy.core.randomness import unit_interval
from convoy.core.records import Split

_SPLIT_WORDS = {
    "train": Split.TRAIN,
    "val": Split.VAL,
    "valid": Split.VAL,
    "validation": Split.VAL,
    "test": Split.TEST,
}


def _each_once(splits: tuple[Split, ...]) -> tuple[Split, ...]:
    return tuple(dict.fromkeys(splits))


# The splits that a config chooses: one that is named twice is meant once.
ChosenSplits = Annotated[tuple[Split, ...], AfterValidator(_each_once)]


class SplitOptions(StrictModel):
    """Which part of `train` becomes `val` and `test`, where the source has no such split of its own.

    A split that the source names is never touched. The fractions are expected values: each sample is drawn
    by itself, so each class gives about its fraction, and a small class may give none. In return no sample is
    ever moved by others that come or go. A fraction of 0 leaves `train` whole.
    """

    val_fraction: float = Field(default=0.1, ge=0, lt=1)
    test_fraction: float = Field(default=0.1, ge=0, lt=1)
    seed: int = 0

    @model_validator(mode="after")
    def _something_is_left_to_train_on(self) -> Self:
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError("val_fraction and test_fraction must add up to less than 1")
        return self

    def on_top_of(self, before: SplitOptions | None) -> SplitOptions:
        """What was told of these options, and else those of before; ConfigError where they do not fit together."""
        if before is None:
            return self
        told = self.model_dump(exclude_unset=True)
        return parse_config(SplitOptions, {**before.model_dump(), **told}, where="splits")

    def given(self, named: Set[Split]) -> SplitOptions:
        """These options for a source that names some splits: what it has is not taken out of train again."""
        return self.model_copy(
            update={
                "val_fraction": 0.0 if Split.VAL in named else self.val_fraction,
                "test_fraction": 0.0 if Split.TEST in named else self.test_fraction,
            }
        )


def parse_split(word: str) -> Split | None:
    """The split that a word names in any case (train; val, valid, validation; test), or None."""
    return _SPLIT_WORDS.get(word.strip().lower())


def draw_split(sample_id: str, options: SplitOptions) -> Split:
    """The split of a sample that lies in train or in no split: depends on the id and the options only.

    `val` grows from below and `test` from above, so changing one fraction moves no sample of the other.
    """
    position = unit_interval(options.seed, "split", sample_id)
    if position < options.val_fraction:
        return Split.VAL
    if position >= 1 - options.test_fraction:
        return Split.TEST
    return Split.TRAIN
