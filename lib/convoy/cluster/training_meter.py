"""How fast an epoch runs, and how long it stands still for images."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TypeVar

from convoy.core.config import StrictModel

ItemT = TypeVar("ItemT")


class Spent(StrictModel):
    """What an epoch took so far: its seconds, and those of them in which it waited for images."""

    seconds: float = 0.0
    wait_s: float = 0.0


class EpochMeter:
    """Counts images and seconds from its making on; of an epoch that goes on after a restart, `before` is added."""

    def __init__(self, before: Spent) -> None:
        self._before = before
        self._started_s = time.monotonic()
        self._num_images = self._num_steps = 0
        self._wait_s = 0.0

    def waiting_for(self, items: Iterator[ItemT]) -> ItemT:
        """The next item, with the time that it took counted as waiting."""
        started_s = time.monotonic()
        item = next(items)
        self._wait_s += time.monotonic() - started_s
        return item

    def count(self, num_images: int) -> None:
        """Images went through a step."""
        self._num_images += num_images
        self._num_steps += 1

    @property
    def spent(self) -> Spent:
        """All that the epoch took."""
        return Spent(seconds=self._before.seconds + self._since_s, wait_s=self._before.wait_s + self._wait_s)

    @property
    def seconds_a_step(self) -> float:
        """Mean since its making."""
        return self._since_s / max(self._num_steps, 1)

    @property
    def images_per_s(self) -> float:
        """Mean rate since its making."""
        return self._num_images / max(self._since_s, 1e-9)

    @property
    def _since_s(self) -> float:
        return time.monotonic() - self._started_s
