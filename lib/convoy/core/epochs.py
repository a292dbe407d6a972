"""Which samples a training step sees: a pure function of seed, epoch and step, whatever the number of workers.

An epoch visits every row once. Its batches have the same size to within one row, so that there is no short last
batch whose gradient and BatchNorm statistics would count too much, and nothing is dropped or padded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from convoy.core.errors import ConfigError
from convoy.core.randomness import generator


def even_share(num_items: int, num_parts: int, part: int) -> range:
    """The consecutive items of one of `num_parts` parts; parts differ in size by one at most."""
    return range(num_items * part // num_parts, num_items * (part + 1) // num_parts)


def shuffled(num_rows: int, seed: int, *position: str | int) -> NDArray[np.int64]:
    """A permutation of the rows that depends on the seed and the position only.

    The order of uniform draws: `Generator.random` is the stream that numpy keeps stable over its versions.
    """
    return np.argsort(generator(seed, "order", *position).random(num_rows), kind="stable")


def rows_by_class(labels_N: NDArray[np.integer]) -> dict[int, NDArray[np.int64]]:
    """The rows of each class that there is, classes and rows in ascending order. One sort, however many classes."""
    classes, counts = np.unique(labels_N, return_counts=True)
    order = np.argsort(labels_N, kind="stable")
    parts = np.split(order, np.cumsum(counts))[:-1]
    return {int(label): rows for label, rows in zip(classes, parts, strict=True)}


def balanced_draw(labels_N: NDArray[np.int64], seed: int, epoch: int) -> NDArray[np.int64]:
    """N rows in which every class is drawn equally often, to within one draw; rows of rare classes repeat.

    Each class is walked through in shuffled passes, so no row of it comes a second time before all came once.
    """
    by_class = rows_by_class(labels_N)
    drawn = []
    for index, (label, rows) in enumerate(by_class.items()):
        wanted = len(even_share(len(labels_N), len(by_class), index))
        passes = [
            rows[shuffled(len(rows), seed, epoch, label, number)] for number in range(-(-wanted // len(rows)))
        ]
        drawn.append(np.concatenate([np.empty(0, np.int64), *passes])[:wanted])
    joined = np.concatenate(drawn)
    return joined[shuffled(len(joined), seed, epoch, "balanced")]


def repetitions(rows_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """How often each row came before in the same order: 0 where it comes for the first time."""
    order = np.argsort(rows_N, kind="stable")
    _, counts = np.unique(rows_N, return_counts=True)
    repetitions_N = np.empty_like(rows_N)
    repetitions_N[order] = np.arange(len(rows_N)) - np.repeat(np.cumsum(counts) - counts, counts)
    return repetitions_N


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochPlan:
    """How an epoch of `num_rows` is cut into steps of at most `batch_size` rows over all workers."""

    num_rows: int
    batch_size: int

    def __post_init__(self) -> None:
        if not 0 < self.batch_size <= self.num_rows:
            raise ConfigError(
                f"a batch of {self.batch_size} rows cannot be filled from {self.num_rows} training rows",
                where="recipe.batch_size",
                next_step="lower the batch size (it counts over all workers), or add images",
            )

    @property
    def num_steps(self) -> int:
        """Steps of one epoch."""
        return -(-self.num_rows // self.batch_size)

    def batch(self, step: int) -> range:
        """The positions in the epoch's order that belong to a step."""
        return even_share(self.num_rows, self.num_steps, step)

    def share(self, step: int, *, rank: int, num_workers: int) -> range:
        """The positions of a step that one worker takes; the workers' shares in order are the whole batch."""
        batch = self.batch(step)
        part = even_share(len(batch), num_workers, rank)
        return range(batch.start + part.start, batch.start + part.stop)

    @property
    def smallest_batch(self) -> int:
        """Rows of the smallest step."""
        return self.num_rows // self.num_steps
