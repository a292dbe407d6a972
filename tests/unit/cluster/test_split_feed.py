from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pyarrow as pa
import pytest
import ray.data
import torch

import made_training
from convoy.cluster import split_feed
from convoy.cluster.batch_feed import EpochOrder
from convoy.cluster.image_loading import PreparedBatch
from convoy.cluster.library_versions import library_versions
from convoy.cluster.running_ahead import ahead
from convoy.cluster.split_feed import SplitFeed, TaskOrder
from convoy.cluster.training_spec import Ingest, TrainingRows, TrainingSpec
from convoy.core.errors import ClusterError, VersionMismatch
from convoy.storage.stores import open_store
from convoy.vision.augmentation_policy import AugmentationPolicy
from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.decode_rule import DecodeRule
from convoy.vision.learner import TrainBatch
from convoy.vision.presets import EvalPreset
from convoy.vision.training_config import Phase, Recipe

PRESET = EvalPreset(resize_px=None, crop_px=8)
NO_ROWS = split_feed._SharedRows(train=None, val=None)
NUM_STEPS, NUM_EPOCHS = 5, 40
PHASE = Phase(name="all", epochs=NUM_EPOCHS, learning_rate=0.1)
FINER = PHASE.model_copy(update={"name": "finer", "resolution_px": 16})


def test_tasks_are_each_epochs_steps_and_then_its_validation() -> None:
    tasks = TaskOrder(num_steps=3, num_validation_batches=2)
    assert [tasks.parse(task) for task in range(7)] == [
        (0, 0, True),
        (0, 1, True),
        (0, 2, True),
        (0, 0, False),
        (0, 1, False),
        (1, 0, True),
        (1, 1, True),
    ]
    for task in range(20):
        epoch, number, is_step = tasks.parse(task)
        assert tasks.step(epoch, number if is_step else 3 + number) == task


@pytest.mark.parametrize(
    ("num_steps", "num_validation", "first", "end"),
    [
        # Whole epochs, as many as a stream holds: 100 are the rest of this one and eight more.
        (10, 2, 0, 96),
        (10, 2, 7, 12 + 8 * 12),
        (100, 0, 30, 100),
        # An epoch that is not much longer is not cut; a long one is, but leaves no short rest.
        (140, 20, 0, 160),
        (1000, 20, 0, 100),
        (1000, 20, 830, 930),
        (1000, 20, 850, 1020),
        # From within a validation.
        (10, 2, 11, 12 + 8 * 12),
    ],
)
def test_a_stream_ends_with_an_epoch_where_it_can(
    monkeypatch: pytest.MonkeyPatch, num_steps: int, num_validation: int, first: int, end: int
) -> None:
    monkeypatch.setattr(split_feed, "_TASKS_A_STREAM", 100)
    tasks = TaskOrder(num_steps, num_validation)
    assert tasks.stream_end(first, longest_epoch=tasks.per_epoch) == end


@pytest.mark.parametrize("num_steps", [7, 90, 1000])
def test_streams_end_at_the_same_step_on_all_workers(monkeypatch: pytest.MonkeyPatch, num_steps: int) -> None:
    """One has a validation batch less."""
    monkeypatch.setattr(split_feed, "_TASKS_A_STREAM", 100)
    ends = []
    for num_validation in (4, 3):
        tasks, first, seen = TaskOrder(num_steps, num_validation), 0, []
        while first < tasks.step(50, 0):
            first = tasks.stream_end(first, longest_epoch=num_steps + 4)
            seen.append(tasks.parse(first))
        ends.append(seen)
    assert ends[0] == ends[1]


class Streams:
    """Stands in for the actors; knows which tasks each stream had, and how often two were open at once."""

    def __init__(self) -> None:
        self.tasks: list[range] = []
        self.open: list[range] = []
        self.most_open = 0

    def start(self, place: object, preset: EvalPreset, tasks: range) -> FakeStream:
        self.tasks.append(tasks)
        self.open.append(tasks)
        self.most_open = max(self.most_open, len(self.open))
        return FakeStream(self, tasks)


class FakeStream:
    def __init__(self, streams: Streams, tasks: range) -> None:
        self.streams, self.tasks = streams, tasks
        self.left = iter(tasks)

    def take(self) -> tuple[int, list[dict[str, Any]]]:
        return next(self.left), []

    def close(self) -> None:
        self.streams.open.remove(self.tasks)


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    streams = Streams()
    monkeypatch.setattr(split_feed, "_Stream", streams.start)
    monkeypatch.setattr(split_feed, "_TASKS_A_STREAM", 30)
    monkeypatch.setattr(split_feed, "_TASKS_BEFORE_NEXT", 4)
    return streams


def training_spec(**settings: Any) -> TrainingSpec:
    return TrainingSpec(
        **{
            "workspace": "/nowhere",
            "run_id": "run",
            "backbone": BackboneConfig(arch="lenet5"),
            "initial_weights_key": "initial",
            "preset": PRESET,
            "decode_rule": DecodeRule(),
            "augmentation": AugmentationPolicy(),
            "recipe": Recipe(batch_size=4),
            "phases": (PHASE,),
            "class_weights": None,
            "balanced_sampling": False,
            "train": TrainingRows(key="train", num_rows=4 * NUM_STEPS),
            "val": TrainingRows(key="val", num_rows=4),
            "batch_size": 4,
            "checkpoint_steps": 10,
            "checkpoint_minutes": 10.0,
            "ingest": Ingest.SPLIT,
            "num_preparers": 2,
            "num_threads": 1,
            "num_fetch_threads": None,
            "stall_s": 600.0,
            "local_cache": None,
            **settings,
        }
    )


@pytest.fixture
def feed(streams: Streams) -> Iterator[SplitFeed]:
    spec = training_spec()
    order = EpochOrder(spec, np.zeros(spec.train.num_rows, np.int64), rank=0, num_workers=1)
    feed = SplitFeed(spec, order, rank=0, num_workers=1)
    yield feed
    assert feed._batches is not None
    feed._batches.close()
    assert streams.open == []


def test_a_training_goes_through_streams_that_overlap(feed: SplitFeed, streams: Streams) -> None:
    for epoch in range(NUM_EPOCHS):
        assert len(list(feed.steps(epoch, 0, PRESET))) == NUM_STEPS
        assert list(feed.validation(epoch, PRESET)) == []
    # An epoch is five steps and a batch of validation rows; five such are a stream.
    assert streams.tasks == [range(first, first + 30) for first in range(0, 6 * NUM_EPOCHS, 30)]
    assert streams.most_open == 2


def test_a_training_that_leaves_its_order_ends_its_streams(feed: SplitFeed, streams: Streams) -> None:
    # Far enough for the next stream to be open.
    for epoch in range(5):
        list(feed.steps(epoch, 0, PRESET))
        list(feed.validation(epoch, PRESET))
    list(feed.steps(39, 3, PRESET))
    assert streams.tasks[-1] == range(39 * 6 + 3, 40 * 6)
    assert len(streams.open) <= 1
    # As the statistics of averaged weights are measured; nothing follows.
    list(feed.steps(0, 2, PRESET))
    assert streams.tasks[-1] == range(2, 5)


def test_each_batch_is_a_task_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """One preparer would work on many steps in a row, while the training waits for the first of them."""
    asked: dict[str, Any] = {}

    class Numbers:
        def map_batches(self, *_: Any, **options: Any) -> Numbers:
            asked.update(options)
            return self

    def from_items(items: list[Any], *, override_num_blocks: int) -> Numbers:
        asked.update(num_items=len(items), num_blocks=override_num_blocks)
        return Numbers()

    monkeypatch.setattr(split_feed.ray.data, "from_items", from_items)
    place = split_feed._Place(training_spec().model_dump_json(), 0, 1, {})
    split_feed._TaskStream(place, PRESET)._dataset(range(100, 3100), NO_ROWS)
    assert asked["num_blocks"] == asked["num_items"] == 3000
    assert asked["batch_size"] == 1
    assert asked["compute"].max_size == 2


@pytest.mark.parametrize(
    ("settings", "num_workers", "num_rows", "num_px"),
    [
        ({}, 1, 4, 8),
        ({"val": None}, 1, 4, 8),
        ({"val": None}, 3, 2, 8),
        ({"val": TrainingRows(key="val", num_rows=5000)}, 2, 2, 8),
        ({"val": None, "phases": (FINER, PHASE)}, 1, 4, 16),
    ],
)
def test_a_stream_keeps_to_what_its_plan_says_it_takes_of_the_object_store(
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    num_workers: int,
    num_rows: int,
    num_px: int,
) -> None:
    limits = []

    def from_items(*_: Any, **__: Any) -> Any:
        limits.append(ray.data.DataContext.get_current().execution_options.resource_limits)
        return MagicMock()

    monkeypatch.setattr(split_feed.ray.data, "from_items", from_items)
    spec = training_spec(**settings)
    place = split_feed._Place(spec.model_dump_json(), 0, num_workers, {})
    split_feed._TaskStream(place, PRESET)._dataset(range(10), NO_ROWS)
    assert spec.largest_batch_bytes(num_workers) == num_rows * 3 * num_px**2
    # Three batches of each of its two preparers.
    assert [limit.object_store_memory for limit in limits] == [6 * num_rows * 3 * num_px**2]
    assert (
        ray.data.DataContext.get_current().execution_options.resource_limits.object_store_memory == math.inf
    )


def test_notes_of_a_batch_come_with_it_through_ray_data(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = TrainBatch(
        images_BCHW=torch.zeros((2, 3, 8, 8), dtype=torch.uint8),
        labels_B=torch.zeros(2, dtype=torch.int64),
        weights_B=torch.ones(2),
    )
    prepared = [
        PreparedBatch(batch=batch, rows_B=np.arange(2), rejects=[], notes=notes)
        for notes in ((), ("disk full", "file damaged"))
    ]
    preparer = object.__new__(split_feed._Preparer)
    monkeypatch.setattr(preparer, "_prepare", lambda _: prepared)
    rows = split_feed._rows(pa.table(preparer({"task": np.array([0])})))
    notes = [split_feed._unpack(row, PRESET, pin_memory=False).notes for row in rows]
    assert notes == [(), ("disk full", "file damaged")]


def test_items_come_in_order_and_the_thread_ends_with_them() -> None:
    assert list(ahead(range(50), 3)) == list(range(50))
    assert all(thread.name != "ahead" for thread in threading.enumerate())


def test_an_error_of_the_items_comes_after_those_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    taken = ahead(items(), 3)
    assert next(taken) == 1
    with pytest.raises(ValueError, match="broken"):
        next(taken)


def test_closing_early_closes_the_items() -> None:
    closed = threading.Event()

    def items() -> Iterator[int]:
        try:
            yield from range(1000)
        finally:
            closed.set()

    taken = ahead(items(), 2)
    assert next(taken) == 0
    taken.close()
    assert closed.is_set()


@pytest.fixture
def digits(tmp_path: Path) -> TrainingSpec:
    """A training of images that are there."""
    return made_training.training_spec(tmp_path, made_training.digit_rows(tmp_path, 20))


class Watch:
    """A DeathWatch outside Ray, for which one batch is deadly."""

    def __init__(self, token: str, *, kind: str, next_step: str) -> None:
        self.kind, self.next_step = kind, next_step

    def watching(self, name: str) -> AbstractContextManager[None]:
        if "step 2" in name:
            raise ClusterError(
                "one batch ended 5 workers", where=f"{self.kind} {name}", next_step=self.next_step
            )
        return nullcontext()


def prepared(
    spec: TrainingSpec, task: int, versions: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> list[dict[str, Any]]:
    """What a preparer answers for a task, as the training worker gets it."""
    monkeypatch.setattr(split_feed, "DeathWatch", Watch)
    monkeypatch.setattr(split_feed.ray, "get", lambda table: table)
    place, store = split_feed._Place(spec.model_dump_json(), 0, 1, versions), open_store(spec.workspace)
    rows = split_feed._SharedRows(spec.train.read(store), spec.val and spec.val.read(store))
    preparer = split_feed._Preparer(place, made_training.PRESET, rows, "token")
    answer = pa.table(
        {name: pa.array(values) for name, values in preparer({"task": np.array([task])}).items()}
    )
    return list(split_feed._rows(answer))


def taken(rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> tuple[int, list[dict[str, Any]]]:
    stream = object.__new__(split_feed._Stream)
    stream._results = iter([(rows[0]["task"], rows)])
    monkeypatch.setattr(split_feed.ray, "get", lambda result: result)
    return stream.take()


def test_a_preparer_answers_with_its_batch(digits: TrainingSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    task, (row,) = taken(prepared(digits, 0, library_versions(), monkeypatch), monkeypatch)
    batch = split_feed._unpack(row, made_training.PRESET, pin_memory=False)
    assert (task, batch.batch.images_BCHW.shape, batch.rejects) == (0, (8, 3, 32, 32), [])


def test_a_preparer_with_other_libraries_than_the_driver_prepares_nothing(
    digits: TrainingSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pixels might be others; and the training ends with what is wrong, as another attempt would."""
    rows = prepared(digits, 0, library_versions() | {"pillow": "1.0"}, monkeypatch)
    with pytest.raises(VersionMismatch, match=r"instead of 1\.0"):
        taken(rows, monkeypatch)


def test_a_batch_that_ends_one_preparer_after_another_ends_the_stream_with_where_it_is(
    digits: TrainingSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = prepared(digits, 1, library_versions(), monkeypatch)
    with pytest.raises(ClusterError, match=r"(?s)batch of step 2 in epoch 1.*preparers_per_worker"):
        taken(rows, monkeypatch)
