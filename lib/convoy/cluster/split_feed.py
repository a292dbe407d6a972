"""Batches from Ray Data workers beside the training: task numbers go out, final-size uint8 images come back.

What a task is, a step's rows or a batch of validation rows, is a pure function of the spec, so a number is all
that the workers need to be told; whichever of them prepares it, and however often, the batch is the same. They
are processes, so that Python's lock, which the threads of one process share, does not bound the images a second. For
the same reason Ray Data is run by an actor beside the training worker: what a worker does in Python between two steps
takes time from the steps.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch

from convoy.cluster.batch_feed import EpochOrder
from convoy.cluster.image_loading import ImageLoader, PreparedBatch, RejectedRow
from convoy.cluster.own_node import actor_here
from convoy.cluster.ray_data import set_up_ray_data
from convoy.cluster.running_ahead import ahead
from convoy.cluster.training_spec import CPUS_A_PREPARER, TrainingSpec
from convoy.core.errors import ClusterError
from convoy.storage.stores import open_store
from convoy.vision.forward import use_threads
from convoy.vision.learner import TrainBatch
from convoy.vision.presets import EvalPreset

# Ray Data tasks that a stream is cut into at most: more would only make Ray's plan longer.
_MAX_BLOCKS = 1000
_BATCHES_AHEAD = 2


@dataclass(frozen=True, slots=True)
class TaskOrder:
    """The tasks of a training in their order, numbered from 0: each epoch's steps, then its validation batches."""

    num_steps: int
    num_validation_batches: int

    @property
    def per_epoch(self) -> int:
        """Tasks of one epoch."""
        return self.num_steps + self.num_validation_batches

    def step(self, epoch: int, step: int) -> int:
        """The task that prepares a step; one past the last step is the first validation batch."""
        return epoch * self.per_epoch + step

    def parse(self, task: int) -> tuple[int, int, bool]:
        """(epoch, number of the step or of the validation batch, whether it is a step)."""
        epoch, index = divmod(task, self.per_epoch)
        is_step = index < self.num_steps
        return epoch, index if is_step else index - self.num_steps, is_step


class SplitFeed:
    """The batches of one worker, prepared by `spec.num_preparers` Ray Data actors of its own.

    One stream of tasks serves all epochs of a resolution: actors start once, and the next epoch is prepared
    while the validation runs. It is opened anew only where the training leaves its order.
    """

    def __init__(
        self, spec: TrainingSpec, order: EpochOrder, *, rank: int, num_workers: int, pin_memory: bool = False
    ) -> None:
        self._spec, self._order, self._pin_memory = spec, order, pin_memory
        self._place = _Place(spec.model_dump_json(), rank, num_workers)
        num_val = 0 if spec.val is None else spec.val.num_rows
        batches = order.validation(num_val, spec.preset)
        self._tasks = TaskOrder(order.plan.num_steps, len(batches))
        self._num_epochs = sum(phase.epochs for phase in spec.phases)
        self._stream: Generator[tuple[int, list[PreparedBatch]]] | None = None
        self._next: tuple[int, EvalPreset] | None = None

    def steps(self, epoch: int, first_step: int, preset: EvalPreset) -> Iterator[list[PreparedBatch]]:
        """The worker's passes of each step of an epoch, from a step on."""
        end = self._tasks.step(epoch, self._order.plan.num_steps)
        return self._take(self._tasks.step(epoch, first_step), end, preset)

    def validation(self, epoch: int, preset: EvalPreset) -> Iterator[PreparedBatch]:
        """The worker's part of the validation rows after an epoch."""
        first = self._tasks.step(epoch, self._order.plan.num_steps)
        for batches in self._take(first, self._tasks.step(epoch + 1, 0), preset):
            yield from batches

    def _take(self, first: int, end: int, preset: EvalPreset) -> Iterator[list[PreparedBatch]]:
        """What the tasks from `first` to before `end` prepared."""
        for task in range(first, end):
            if self._stream is None or self._next != (task, preset):
                self._open(task, preset)
            number, prepared = next(self._stream)  # type: ignore[arg-type]
            if number != task:
                raise ClusterError(f"Ray Data gave batch {number} where {task} was due")
            self._next = (task + 1, preset)
            yield prepared

    def _open(self, first: int, preset: EvalPreset) -> None:
        if self._stream is not None:
            # Its actors hold the CPUs that those of the next stream wait for.
            self._stream.close()
        end = max(self._tasks.step(self._num_epochs, 0), first + 1)
        self._stream = ahead(self._prepared(first, end, preset), _BATCHES_AHEAD)

    def _prepared(
        self, first: int, end: int, preset: EvalPreset
    ) -> Iterator[tuple[int, list[PreparedBatch]]]:
        stream = actor_here(_TaskStream).remote(self._place, preset)
        tasks = stream.run.options(
            num_returns="streaming", _generator_backpressure_num_objects=_BATCHES_AHEAD
        ).remote(first, end, self._spec.num_preparers, self._order.plan.batch_size)
        try:
            for reference in tasks:
                task, passes = ray.get(reference)
                yield task, [_unpack(row, preset, pin_memory=self._pin_memory) for row in passes]
        finally:
            # Its preparers end with it.
            ray.kill(stream)


@dataclass(frozen=True, slots=True)
class _Place:
    """Whose batches: a training, and a worker's rank in its group."""

    spec_json: str
    rank: int
    num_workers: int


class _TaskStream:
    """The actor that runs Ray Data for one training worker, on its node."""

    def __init__(self, place: _Place, preset: EvalPreset) -> None:
        set_up_ray_data()
        self._place, self._preset = place, preset

    def run(
        self, first: int, end: int, num_preparers: int, batch_size: int
    ) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """The tasks from `first` to before `end`, in order, each with a row for each of its passes."""
        blocks = self._dataset(first, end, num_preparers, batch_size).iter_batches(
            batch_size=None, batch_format="pyarrow"
        )
        rows = (row for block in blocks for row in _rows(block))
        for task, passes in groupby(rows, key=itemgetter("task")):
            yield task, list(passes)

    def _dataset(self, first: int, end: int, num_preparers: int, batch_size: int) -> Any:
        """One row a pass, in order; a row holds all images of the pass as bytes."""
        context = ray.data.DataContext.get_current().copy()
        context.execution_options.preserve_order = True
        # A block goes out as soon as it holds a batch, not when all steps of its Ray task are done.
        context.target_max_block_size = batch_size * 3 * self._preset.crop_px**2
        with ray.data.DataContext.current(context):
            # Not `range`: its tasks want a whole CPU, which training workers and preparers may not leave.
            tasks = [{"task": task} for task in range(first, end)]
            numbers = ray.data.from_items(tasks, override_num_blocks=min(len(tasks), _MAX_BLOCKS))
            return numbers.map_batches(
                _Preparer,
                fn_constructor_args=(self._place, self._preset),
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=min(num_preparers, len(tasks))),
                num_cpus=CPUS_A_PREPARER,
            )


class _Preparer:
    """The actor that Ray Data makes for each place in the pool. It decodes in one thread: a pool has many."""

    def __init__(self, place: _Place, preset: EvalPreset) -> None:
        use_threads(1)
        spec = TrainingSpec.model_validate_json(place.spec_json)
        store = open_store(spec.workspace)
        train = store.open_parquet(spec.train.key).read()
        labels_N = train["label"].to_numpy()
        self._order = EpochOrder(spec, labels_N, rank=place.rank, num_workers=place.num_workers)
        self._preset = preset
        self._train = ImageLoader(spec, train, num_threads=1)
        self._val = None
        if spec.val is not None:
            self._val = ImageLoader(spec, store.open_parquet(spec.val.key).read(), num_threads=1)
        self._validation = (
            [] if self._val is None else self._order.validation(self._val.num_rows, self._preset)
        )
        self._tasks = TaskOrder(self._order.plan.num_steps, len(self._validation))

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        task = int(batch["task"][0])
        prepared = self._prepare(task)
        return {
            "task": [task] * len(prepared),
            # Channels last, as they lie in memory.
            "images": [_channels_last(one.batch.images_BCHW).tobytes() for one in prepared],
            "rows": [one.rows_B.tobytes() for one in prepared],
            "labels": [one.batch.labels_B.numpy().tobytes() for one in prepared],
            "weights": [one.batch.weights_B.numpy().tobytes() for one in prepared],
            "rejects": [[reject.model_dump_json() for reject in one.rejects] for one in prepared],
        }

    def _prepare(self, task: int) -> list[PreparedBatch]:
        epoch, number, is_step = self._tasks.parse(task)
        if is_step:
            (requests,) = self._order.requests(epoch, [number], self._preset)
            return [self._train.prepare(request) for request in requests]
        return [] if self._val is None else [self._val.prepare(self._validation[number])]


def _channels_last(images_BCHW: torch.Tensor) -> np.ndarray:
    array: np.ndarray = images_BCHW.permute(0, 2, 3, 1).contiguous().numpy()
    return array


def _rows(block: pa.Table) -> Iterator[dict[str, Any]]:
    """The rows of a block; what is binary as an array over it, which Ray sends on without pickling it."""
    for row in range(block.num_rows):
        scalars = {name: block[name][row] for name in block.column_names}
        yield {
            name: np.frombuffer(scalar.as_buffer(), _BINARY[name]) if name in _BINARY else scalar.as_py()
            for name, scalar in scalars.items()
        }


_BINARY = {"images": np.uint8, "rows": np.int64, "labels": np.int64, "weights": np.float32}


def _unpack(row: dict[str, Any], preset: EvalPreset, *, pin_memory: bool) -> PreparedBatch:
    """A pass out of Ray's shared memory."""
    labels_B = torch.from_numpy(row["labels"].copy())
    shape = (len(labels_B), preset.crop_px, preset.crop_px, 3)
    images_BHWC = torch.empty(shape, dtype=torch.uint8, pin_memory=pin_memory)
    images_BHWC.numpy()[:] = row["images"].reshape(shape)
    return PreparedBatch(
        batch=TrainBatch(
            images_BCHW=images_BHWC.permute(0, 3, 1, 2),
            labels_B=labels_B,
            weights_B=torch.from_numpy(row["weights"].copy()),
        ),
        rows_B=row["rows"].copy(),
        rejects=[RejectedRow.model_validate_json(str(one)) for one in row["rejects"]],
    )
