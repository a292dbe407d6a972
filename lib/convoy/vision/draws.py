"""Random numbers of augmentation, made of `Generator.random` only: the stream that numpy keeps stable."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

ItemT = TypeVar("ItemT")


def uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """A number in [low, high)."""
    return low + (high - low) * rng.random()


def either_way(rng: np.random.Generator, strength: float) -> float:
    """A number in [-strength, strength)."""
    return uniform(rng, -strength, strength)


def below(rng: np.random.Generator, bound: int) -> int:
    """A whole number from 0 to bound - 1."""
    return int(rng.random() * bound)


def happens(rng: np.random.Generator, probability: float) -> bool:
    """True with this probability; always takes one number from the stream."""
    return rng.random() < probability


def normal(rng: np.random.Generator) -> float:
    """A standard normal number (Box and Muller 1958), from two numbers of the stream."""
    radius = math.sqrt(-2 * math.log(1 - rng.random()))
    return radius * math.cos(2 * math.pi * rng.random())


def shuffled(rng: np.random.Generator, items: Sequence[ItemT]) -> list[ItemT]:
    """The items in random order."""
    return [items[index] for index in np.argsort(rng.random(len(items)), kind="stable")]
