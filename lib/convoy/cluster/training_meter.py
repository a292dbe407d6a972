"""How fast an epoch runs, and how long it stands still for images."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TypeVar

ItemT = TypeVar("ItemT")


class EpochMeter:
    """Counts images and seconds from its making on."""

    def __init__(self) -> None:
        self._started_s = time.monotonic()
        self._num_images = self._num_steps = 0
        self.wait_s = 0.0

    def waiting_for(self, items: Iterator[ItemT]) -> ItemT:
        """The next item, with the time that it took counted as waiting."""
        started_s = time.monotonic()
        item = next(items)
        self.wait_s += time.monotonic() - started_s
        return item

    def count(self, num_images: int) -> None:
        """Images went through a step."""
        self._num_images += num_images
        self._num_steps += 1

    @property
    def seconds(self) -> float:
        """Since its making."""
        return time.monotonic() - self._started_s

    @property
    def seconds_a_step(self) -> float:
        """Mean since its making."""
        return self.seconds / max(self._num_steps, 1)

    @property
    def images_per_s(self) -> float:
        """Mean rate since its making."""
        return self._num_images / max(self.seconds, 1e-9)
