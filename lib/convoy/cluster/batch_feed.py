"""The batches of one training worker: which rows come in which step, and where they are prepared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np

from convoy.cluster.image_loading import BatchRequest, ImageLoader, PreparedBatch
from convoy.cluster.training_spec import TrainingSpec
from convoy.core.epochs import EpochPlan, balanced_draw, even_share, repetitions, shuffled
from convoy.core.errors import ConfigError
from convoy.vision.presets import EvalPreset


class BatchFeed(Protocol):
    """Gives a worker its share of each step, in passes, and of the validation rows.

    Fastest in the order of a training: the steps of an epoch, its validation, the next epoch.
    """

    def steps(self, epoch: int, first_step: int, preset: EvalPreset) -> Iterator[list[PreparedBatch]]:
        """The worker's passes of each step of an epoch, from a step on."""
        ...

    def validation(self, epoch: int, preset: EvalPreset) -> Iterator[PreparedBatch]:
        """The worker's part of the validation rows after an epoch; each row comes to exactly one worker."""
        ...


class EpochOrder:
    """The rows of every step of every epoch for one worker; a pure function of the spec and the labels.

    Raises ConfigError if in some step a worker would have no row.
    """

    def __init__(self, spec: TrainingSpec, labels_N: np.ndarray, *, rank: int, num_workers: int) -> None:
        self.plan = EpochPlan(num_rows=len(labels_N), batch_size=spec.batch_size)
        if self.plan.smallest_batch < num_workers:
            raise ConfigError(
                f"a batch of {self.plan.smallest_batch} rows leaves some of {num_workers} workers without any",
                where="recipe.batch_size",
                next_step="raise the batch size, or lower workers.num_workers",
            )
        self._spec = spec
        self._labels_N = labels_N
        self._rank, self._num_workers = rank, num_workers
        self._last: tuple[int, np.ndarray, np.ndarray] | None = None

    def _ordered(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows of an epoch in their order, and the number of each one's draw.

        Each row comes once, or classes equally often where the spec says so.
        """
        # Whoever prepares single steps asks for the same epoch again and again, and a million rows take 0.1 s to order.
        last = self._last
        if last is None or last[0] != epoch:
            rows_N = self._draw(epoch)
            by_place = self._spec.draw_version == 1
            last = self._last = (epoch, rows_N, np.arange(len(rows_N)) if by_place else repetitions(rows_N))
        return last[1:]

    def _draw(self, epoch: int) -> np.ndarray:
        seed = self._spec.recipe.seed
        if self._spec.balanced_sampling:
            return balanced_draw(self._labels_N, seed, epoch)
        return shuffled(len(self._labels_N), seed, epoch)

    def requests(self, epoch: int, steps: Iterable[int], preset: EvalPreset) -> Iterator[list[BatchRequest]]:
        """The worker's passes of each step: on every worker as many, and all have at least one row."""
        rows_N, draws_N = self._ordered(epoch)
        for step in steps:
            share = self.plan.share(step, rank=self._rank, num_workers=self._num_workers)
            num_passes = min(self._spec.recipe.accumulate, len(self.plan.batch(step)) // self._num_workers)
            shares = (even_share(len(share), num_passes, number) for number in range(num_passes))
            parts = [share[part.start : part.stop] for part in shares]
            yield [
                BatchRequest(
                    rows_B=rows_N[part.start : part.stop],
                    preset=preset,
                    epoch=epoch,
                    draws_B=draws_N[part.start : part.stop],
                )
                for part in parts
            ]

    def validation(self, num_rows: int, preset: EvalPreset) -> list[BatchRequest]:
        """The worker's part of so many validation rows, as evaluation shows them."""
        share = even_share(num_rows, self._num_workers, self._rank)
        mine = np.arange(share.start, share.stop)
        batch_rows = self._spec.validation_batch_rows(self._num_workers)
        return [
            BatchRequest(rows_B=mine[start : start + batch_rows], preset=preset)
            for start in range(0, len(mine), batch_rows)
        ]

    def most_validation_batches(self, num_rows: int) -> int:
        """How many batches of so many validation rows the worker with the largest part has."""
        return -(-num_rows // (self._num_workers * self._spec.validation_batch_rows(self._num_workers)))


class FusedFeed:
    """Prepares batches in threads of the training worker itself, so that pixels never leave its process."""

    def __init__(self, order: EpochOrder, train: ImageLoader, val: ImageLoader | None) -> None:
        self._order = order
        self._train, self._val = train, val

    def steps(self, epoch: int, first_step: int, preset: EvalPreset) -> Iterator[list[PreparedBatch]]:
        """The worker's passes of each step of an epoch, from a step on."""
        numbers = range(first_step, self._order.plan.num_steps)
        requests = list(self._order.requests(epoch, numbers, preset))
        batches = self._train.load(request for step in requests for request in step)
        for step in requests:
            yield [next(batches) for _ in step]

    def validation(self, epoch: int, preset: EvalPreset) -> Iterator[PreparedBatch]:
        """The worker's part of the validation rows, the same after every epoch."""
        if self._val is None:
            return iter(())
        return self._val.load(self._order.validation(self._val.num_rows, preset))
