"""Batches from Ray Data workers beside the training: task numbers go out, final-size uint8 images come back.

What a task is, a step's rows or a batch of validation rows, is a pure function of the spec, so a number is all
that the workers need to be told; whichever of them prepares it, and however often, the batch is the same. They
are processes, so that Python's lock, which the threads of one process share, does not bound the images a second. For
the same reason Ray Data is run by an actor beside the training worker: what a worker does in Python between two steps
takes time from the steps.
"""

from __future__ import annotations

import pickle
import secrets
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch

from convoy.cluster.batch_feed import EpochOrder
from convoy.cluster.deadly_slices import DeathWatch
from convoy.cluster.image_loading import ImageLoader, PreparedBatch, RejectedRow
from convoy.cluster.library_versions import library_versions, version_mismatch
from convoy.cluster.own_node import actor_here
from convoy.cluster.ray_data import set_up_ray_data
from convoy.cluster.running_ahead import ahead
from convoy.cluster.training_spec import CPUS_A_PREPARER, TrainingSpec, object_store_bytes
from convoy.core.errors import ClusterError, ConvoyError
from convoy.storage.stores import open_store
from convoy.vision.forward import use_threads
from convoy.vision.learner import TrainBatch
from convoy.vision.presets import EvalPreset

# Ray Data has a task for each batch, so that all preparers work on the next ones, and it remembers each until the
# stream ends: so training is cut into streams of about so many, whose plan takes a second or two and some megabytes.
_TASKS_A_STREAM = 4096
# When so many are left, the next stream starts: its preparers are ready when this one ends.
_TASKS_BEFORE_NEXT = 512
_BATCHES_AHEAD = 2
_AFTER_A_DEADLY_BATCH = (
    "most likely the memory is too small: use fewer preparers (workers.preparers_per_worker), or find the image that"
    " does it; then run the same command again to go on from the newest checkpoint"
)


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

    def stream_end(self, first: int, *, longest_epoch: int) -> int:
        """Where a stream that begins with a task ends: with an epoch, or within one that is much longer than a stream.

        `longest_epoch` are the tasks of the worker that has most. So all workers' streams end at the same step: else
        those who go on could hold the CPUs that the next stream of one needs for whom they wait.
        """
        epoch, number, is_step = self.parse(first)
        steps_left = self.num_steps - number if is_step else 0
        if steps_left > 1.5 * _TASKS_A_STREAM:
            return first + _TASKS_A_STREAM
        more_epochs = max(0, _TASKS_A_STREAM - steps_left) // longest_epoch
        return self.step(epoch + 1 + more_epochs, 0)


class SplitFeed:
    """The batches of one worker, prepared by `spec.num_preparers` Ray Data actors of its own.

    Streams of tasks follow each other through all epochs of a resolution: actors serve thousands of steps, and the
    next epoch is prepared while the validation runs. They begin anew only where the training leaves its order.
    """

    def __init__(
        self, spec: TrainingSpec, order: EpochOrder, *, rank: int, num_workers: int, pin_memory: bool = False
    ) -> None:
        self._pin_memory = pin_memory
        # The libraries of the driver: with others this worker would not run.
        self._place = _Place(spec.model_dump_json(), rank, num_workers, library_versions())
        num_val = 0 if spec.val is None else spec.val.num_rows
        num_steps, batches = order.plan.num_steps, order.validation(num_val, spec.preset)
        self._tasks = TaskOrder(num_steps, len(batches))
        self._longest_epoch = num_steps + order.most_validation_batches(num_val)
        self._num_epochs = sum(phase.epochs for phase in spec.phases)
        self._batches: Generator[tuple[int, list[PreparedBatch]]] | None = None
        self._next: tuple[int, EvalPreset] | None = None

    def steps(self, epoch: int, first_step: int, preset: EvalPreset) -> Iterator[list[PreparedBatch]]:
        """The worker's passes of each step of an epoch, from a step on."""
        end = self._tasks.step(epoch, self._tasks.num_steps)
        return self._take(self._tasks.step(epoch, first_step), end, preset)

    def validation(self, epoch: int, preset: EvalPreset) -> Iterator[PreparedBatch]:
        """The worker's part of the validation rows after an epoch."""
        first = self._tasks.step(epoch, self._tasks.num_steps)
        for batches in self._take(first, self._tasks.step(epoch + 1, 0), preset):
            yield from batches

    def _take(self, first: int, end: int, preset: EvalPreset) -> Iterator[list[PreparedBatch]]:
        """What the tasks from `first` to before `end` prepared."""
        for task in range(first, end):
            if self._batches is None or self._next != (task, preset):
                self._open(task, end, preset)
            number, prepared = next(self._batches)  # type: ignore[arg-type]
            if number != task:
                raise ClusterError(f"Ray Data gave batch {number} where {task} was due")
            self._next = (task + 1, preset)
            yield prepared

    def _open(self, first: int, end: int, preset: EvalPreset) -> None:
        if self._batches is not None:
            # Its actors hold the CPUs that those of the next stream wait for.
            self._batches.close()
        if self._next is None or first >= self._next[0]:
            # After what is asked for comes the rest of the training; a look back ends with it.
            end = max(self._tasks.step(self._num_epochs, 0), end)
        self._batches = ahead(self._prepared(first, end, preset), _BATCHES_AHEAD)

    def _prepared(
        self, first: int, end: int, preset: EvalPreset
    ) -> Iterator[tuple[int, list[PreparedBatch]]]:
        """What the tasks prepared, through one stream after another; the next starts beside the end of the last."""
        stream, following = self._stream(first, end, preset), None
        try:
            for due in range(first, end):
                if following is not None and due == stream.tasks.stop:
                    stream.close()
                    stream, following = following, None
                task, passes = stream.take()
                if following is None and stream.tasks.stop < min(end, due + _TASKS_BEFORE_NEXT):
                    following = self._stream(stream.tasks.stop, end, preset)
                yield task, [_unpack(row, preset, pin_memory=self._pin_memory) for row in passes]
        finally:
            for one in (stream, following):
                if one is not None:
                    one.close()

    def _stream(self, first: int, end: int, preset: EvalPreset) -> _Stream:
        stop = min(end, self._tasks.stream_end(first, longest_epoch=self._longest_epoch))
        return _Stream(self._place, preset, range(first, stop))


@dataclass(frozen=True, slots=True)
class _Place:
    """Whose batches: a training, a worker's rank in its group, and the libraries that prepare them."""

    spec_json: str
    rank: int
    num_workers: int
    versions: Mapping[str, str]


class _SharedRows(NamedTuple):
    """References to the tables of rows in Ray's object store, where all preparers of a node share one copy."""

    train: Any
    val: Any | None


class _Stream:
    """Tasks in a row that are being prepared."""

    def __init__(self, place: _Place, preset: EvalPreset, tasks: range) -> None:
        self.tasks = tasks
        self._actor = actor_here(_TaskStream).remote(place, preset)
        self._results = self._actor.run.options(
            num_returns="streaming", _generator_backpressure_num_objects=_BATCHES_AHEAD
        ).remote(tasks)

    def take(self) -> tuple[int, list[dict[str, Any]]]:
        """The next task, with a row for each of its passes. Raises the ConvoyError that kept it from being prepared."""
        task, passes = ray.get(next(self._results))
        for row in passes:
            if row["error"]:
                raise pickle.loads(row["error"])
        return task, passes

    def close(self) -> None:
        """End the actor, and its preparers with it."""
        ray.kill(self._actor)


class _TaskStream:
    """The actor that runs Ray Data for one training worker, on its node."""

    def __init__(self, place: _Place, preset: EvalPreset) -> None:
        set_up_ray_data()
        self._place, self._preset = place, preset
        self._spec = TrainingSpec.model_validate_json(place.spec_json)

    def run(self, tasks: range) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """The tasks in their order, each with a row for each of its passes."""
        store, val = open_store(self._spec.workspace), self._spec.val
        rows = _SharedRows(
            train=ray.put(self._spec.train.read(store)),
            val=None if val is None else ray.put(val.read(store)),
        )
        blocks = self._dataset(tasks, rows).iter_batches(batch_size=None, batch_format="pyarrow")
        prepared = (row for block in blocks for row in _rows(block))
        for task, passes in groupby(prepared, key=itemgetter("task")):
            yield task, list(passes)

    def _dataset(self, tasks: range, rows: _SharedRows) -> Any:
        """One row a pass, in order; a row holds all images of the pass as bytes."""
        context = ray.data.DataContext.get_current().copy()
        context.execution_options.preserve_order = True
        # Ray Data would fill half of the object store with batches ahead, for each worker and for each stream.
        batch_bytes = self._spec.largest_batch_bytes(self._place.num_workers)
        context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(
            object_store_memory=object_store_bytes(self._spec.num_preparers, batch_bytes)
        )
        with ray.data.DataContext.current(context):
            # Not `range`: its tasks want a whole CPU, which training workers and preparers may not leave.
            numbers = ray.data.from_items([{"task": task} for task in tasks], override_num_blocks=len(tasks))
            return numbers.map_batches(
                _Preparer,
                fn_constructor_args=(self._place, self._preset, rows, secrets.token_hex(8)),
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=min(self._spec.num_preparers, len(tasks))),
                num_cpus=CPUS_A_PREPARER,
            )


class _Preparer:
    """The actor that Ray Data makes for each place in the pool. It decodes in one thread: a pool has many.

    Our own errors come back as rows: of what a worker raises, Ray Data passes on no more than the text.
    """

    def __init__(self, place: _Place, preset: EvalPreset, rows: _SharedRows, token: str) -> None:
        use_threads(1)
        self._mismatch = version_mismatch(place.versions)
        self._watch = DeathWatch(token, kind="batch", next_step=_AFTER_A_DEADLY_BATCH)
        spec = TrainingSpec.model_validate_json(place.spec_json)
        train, val = ray.get(rows.train), None if rows.val is None else ray.get(rows.val)
        labels_N = train["label"].to_numpy()
        self._order = EpochOrder(spec, labels_N, rank=place.rank, num_workers=place.num_workers)
        self._preset = preset
        self._train = ImageLoader(spec, train, num_threads=1)
        self._val = None
        if val is not None:
            self._val = ImageLoader(spec, val, num_threads=1)
        self._validation = (
            [] if self._val is None else self._order.validation(self._val.num_rows, self._preset)
        )
        self._tasks = TaskOrder(self._order.plan.num_steps, len(self._validation))

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        task = int(batch["task"][0])
        try:
            prepared = self._prepare(task)
        except ConvoyError as error:
            nothing = {name: [b""] for name in _BINARY}
            return {"task": [task], **nothing, "rejects": [[]], "notes": [""], "error": [pickle.dumps(error)]}
        return {
            "task": [task] * len(prepared),
            # Channels last, as they lie in memory.
            "images": [_channels_last(one.batch.images_BCHW).tobytes() for one in prepared],
            "rows": [one.rows_B.tobytes() for one in prepared],
            "labels": [one.batch.labels_B.numpy().tobytes() for one in prepared],
            "weights": [one.batch.weights_B.numpy().tobytes() for one in prepared],
            "rejects": [[reject.model_dump_json() for reject in one.rejects] for one in prepared],
            "notes": ["\n".join(one.notes) for one in prepared],
            "error": [b""] * len(prepared),
        }

    def _prepare(self, task: int) -> list[PreparedBatch]:
        if self._mismatch is not None:
            raise self._mismatch
        epoch, number, is_step = self._tasks.parse(task)
        kind = "step" if is_step else "validation batch"
        with self._watch.watching(f"of {kind} {number + 1} in epoch {epoch + 1}"):
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
            num_missing=len(row["rejects"]),
        ),
        rows_B=row["rows"].copy(),
        rejects=[RejectedRow.model_validate_json(str(one)) for one in row["rejects"]],
        notes=tuple(row["notes"].splitlines()),
    )
