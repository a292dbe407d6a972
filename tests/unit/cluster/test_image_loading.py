from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from convoy.cluster import image_loading
from convoy.cluster.batch_feed import EpochOrder, FusedFeed
from convoy.cluster.image_loading import BatchRequest, ImageLoader, PreparedBatch
from convoy.cluster.training_spec import TrainingSpec
from convoy.core.errors import ConfigError
from convoy.core.records import RejectCode, Stage
from convoy.storage.local_cache import LocalCacheOptions
from convoy.vision.augmentation_policy import AugmentationPolicy
from made_training import PRESET, digit_rows, frozen_rows, recipe, training_spec
from noting_watch import NotingWatch

NUM_IMAGES = 24


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    table = digit_rows(tmp_path_factory.mktemp("digits"), NUM_IMAGES)
    weights = pa.array(np.linspace(0.5, 2, NUM_IMAGES), pa.float32())
    return table.set_column(table.schema.get_field_index("weight"), table.schema.field("weight"), weights)


@pytest.fixture
def spec(tmp_path: Path, rows: pa.Table) -> TrainingSpec:
    return training_spec(tmp_path, rows)


def request(rows_B: list[int], *, epoch: int | None = None) -> BatchRequest:
    draws = None if epoch is None else np.zeros(len(rows_B), np.int64)
    return BatchRequest(rows_B=np.array(rows_B), preset=PRESET, epoch=epoch, draws_B=draws)


def images_by_row(
    spec: TrainingSpec, rows: pa.Table, batch_size: int, epoch: int | None, **changes: Any
) -> torch.Tensor:
    loader = ImageLoader(spec.model_copy(update=changes), rows)
    batches = [
        list(range(NUM_IMAGES))[start : start + batch_size] for start in range(0, NUM_IMAGES, batch_size)
    ]
    prepared = list(loader.load([request(batch, epoch=epoch) for batch in batches]))
    return torch.cat([one.batch.images_BCHW for one in prepared])


def test_batches_come_in_the_order_of_the_requests_with_their_labels_and_weights(
    spec: TrainingSpec, rows: pa.Table
) -> None:
    wanted = [[5, 1, 1], [23], [0, 7, 9, 2], [4], [6], [8, 3], [11], [10]]
    loader = ImageLoader(spec, rows)
    prepared = list(loader.load(request(batch) for batch in wanted))
    single = images_by_row(spec, rows, 1, None)
    assert len(prepared) == len(wanted)
    for batch, one in zip(wanted, prepared, strict=True):
        assert torch.equal(one.batch.images_BCHW, single[batch])
        assert one.batch.labels_B.tolist() == [rows["label"][row].as_py() for row in batch]
        assert one.batch.weights_B.tolist() == [rows["weight"][row].as_py() for row in batch]
        assert one.batch.labels_B.dtype is torch.int64
        assert one.rejects == []


def test_augmentation_does_not_depend_on_batches_or_threads(spec: TrainingSpec, rows: pa.Table) -> None:
    expected = images_by_row(spec, rows, 24, 3)
    for batch_size, num_threads, num_fetch_threads in [(1, 1, 1), (5, 4, 3), (24, 3, 8)]:
        found = images_by_row(
            spec, rows, batch_size, 3, num_threads=num_threads, num_fetch_threads=num_fetch_threads
        )
        assert torch.equal(found, expected)


def test_augmentation_differs_between_epochs_and_seeds_and_repetitions_but_not_in_evaluation(
    spec: TrainingSpec, rows: pa.Table
) -> None:
    policy = AugmentationPolicy.model_validate({**spec.augmentation.model_dump(), "seed": 5})
    drawn = [
        images_by_row(spec, rows, 8, 0),
        images_by_row(spec, rows, 8, 1),
        images_by_row(spec, rows, 8, 0, augmentation=policy),
        images_by_row(spec, rows, 8, None),
    ]
    for index, one in enumerate(drawn):
        for other in drawn[:index]:
            assert (one != other).flatten(1).any(1).float().mean() > 0.8
    twice = ImageLoader(spec, rows).prepare(
        BatchRequest(rows_B=np.array([3, 3]), preset=PRESET, epoch=0, draws_B=np.array([0, 1]))
    )
    assert not torch.equal(*twice.batch.images_BCHW)


@pytest.fixture
def damaged(tmp_path: Path) -> tuple[TrainingSpec, pa.Table]:
    """Rows of digits; one is damaged, one has gone since the freezing."""
    rows = digit_rows(tmp_path, 6)
    paths = [Path(uri) for uri in rows["uri"].to_pylist()]
    paths[1].write_bytes(paths[1].read_bytes()[:200])
    rows = frozen_rows(tmp_path / "second", tmp_path / "images")
    assert [Path(uri) for uri in rows["uri"].to_pylist()] == paths
    paths[4].unlink()
    return training_spec(tmp_path / "workspace", rows), rows


@pytest.mark.parametrize("epoch", [None, 0])
def test_rejects_are_told_by_row_and_left_out(
    damaged: tuple[TrainingSpec, pa.Table], epoch: int | None
) -> None:
    spec, rows = damaged
    prepared = ImageLoader(spec, rows).prepare(request([5, 4, 0, 1, 1, 2], epoch=epoch))
    assert [(one.row, one.stage, one.code) for one in prepared.rejects] == [
        (4, Stage.FETCH, RejectCode.GONE),
        (1, Stage.DECODE, RejectCode.TRUNCATED),
        (1, Stage.DECODE, RejectCode.TRUNCATED),
    ]
    assert prepared.batch.labels_B.tolist() == [rows["label"][row].as_py() for row in (5, 0, 2)]
    assert prepared.batch.images_BCHW.shape == (3, 3, 32, 32)
    if epoch is None:
        alone = ImageLoader(spec, rows).prepare(request([5, 0, 2]))
        assert torch.equal(prepared.batch.images_BCHW, alone.batch.images_BCHW)


def test_a_batch_may_be_empty(damaged: tuple[TrainingSpec, pa.Table]) -> None:
    prepared = ImageLoader(*damaged).prepare(request([1, 4, 1], epoch=0))
    assert prepared.batch.images_BCHW.shape == (0, 3, 32, 32)
    assert prepared.batch.labels_B.shape == prepared.batch.weights_B.shape == (0,)
    assert len(prepared.rejects) == 3


def test_batches_tell_what_is_wrong_with_the_image_cache(
    spec: TrainingSpec, rows: pa.Table, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    folder = str(tmp_path / "file" / "images")
    cached = spec.model_copy(update={"local_cache": LocalCacheOptions(folder=folder, max_bytes=1 << 20)})
    loader = ImageLoader(cached, rows)
    assert loader.prepare(request([0])).notes == ()
    assert loader._reader.cache is not None
    loader._reader.cache.offer(bytes(16), b"image")
    note = "image cache of a node (local_cache): nothing more is admitted: Not a directory"
    assert [loader.prepare(request([row])).notes for row in (1, 2)] == [(note,)] * 2


def threads_ahead() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "ahead"]


def test_closing_early_stops_the_thread_and_the_loader_goes_on(spec: TrainingSpec, rows: pa.Table) -> None:
    loader = ImageLoader(spec, rows)
    asked = []

    def endless() -> Iterator[BatchRequest]:
        while True:
            asked.append(1)
            yield request([0, 1], epoch=0)

    for limit in (1, 3):
        batches = loader.load(endless())
        for _ in range(limit):
            next(batches)
        assert len(threads_ahead()) == 1
        batches.close()  # type: ignore[attr-defined]
        assert threads_ahead() == []
        number = len(asked)
        time.sleep(0.05)
        assert len(asked) == number
    assert len(list(loader.load([request([2])]))) == 1


def test_an_error_of_the_thread_reaches_the_consumer(spec: TrainingSpec, rows: pa.Table) -> None:
    def failing() -> Iterator[BatchRequest]:
        for _ in range(20):  # more rows than are read at once
            yield request(list(range(NUM_IMAGES)) * 10, epoch=0)
        raise OSError("the store is on fire")

    batches = ImageLoader(spec, rows).load(failing())
    assert len(next(batches).batch.labels_B) == 10 * NUM_IMAGES
    with pytest.raises(OSError, match="on fire"):
        list(batches)
    assert threads_ahead() == []


def order(spec: TrainingSpec, num_rows: int = 23, *, rank: int = 0, num_workers: int = 1) -> EpochOrder:
    labels_N = np.arange(num_rows) % 3
    return EpochOrder(spec, labels_N, rank=rank, num_workers=num_workers)


def requested(made: EpochOrder, epoch: int = 0) -> list[list[BatchRequest]]:
    return list(made.requests(epoch, range(made.plan.num_steps), PRESET))


def rows_of(made: EpochOrder, epoch: int) -> np.ndarray:
    return np.concatenate([one.rows_B for step in requested(made, epoch) for one in step])


@pytest.mark.parametrize("num_workers", [1, 2, 3])
@pytest.mark.parametrize("accumulate", [1, 2, 7])
def test_an_epoch_requests_every_row_once_in_one_order(
    spec: TrainingSpec, num_workers: int, accumulate: int
) -> None:
    spec = spec.model_copy(update={"recipe": recipe(accumulate=accumulate)})
    alone = rows_of(order(spec), 0)
    assert sorted(alone) == list(range(23))
    workers = [requested(order(spec, rank=rank, num_workers=num_workers)) for rank in range(num_workers)]
    together = []
    for step in zip(*workers, strict=True):
        assert len({len(passes) for passes in step}) == 1
        together += [row for passes in step for one in passes for row in one.rows_B]
        assert all(len(one.rows_B) for passes in step for one in passes)
    assert together == alone.tolist()


def test_the_order_of_an_epoch_is_its_own_and_resumes_in_the_middle(spec: TrainingSpec) -> None:
    made = order(spec)
    assert not np.array_equal(rows_of(made, 0), rows_of(made, 1))
    late = list(made.requests(1, range(2, 3), PRESET))
    assert np.array_equal(late[0][0].rows_B, requested(made, 1)[2][0].rows_B)
    assert np.array_equal(late[0][0].draws_B, requested(made, 1)[2][0].draws_B)  # type: ignore[arg-type]


def test_balanced_sampling_draws_classes_equally(spec: TrainingSpec) -> None:
    balanced = spec.model_copy(update={"balanced_sampling": True})
    labels_N = np.repeat([0, 1], [18, 6])
    made = EpochOrder(balanced, labels_N, rank=0, num_workers=1)
    assert np.bincount(labels_N[rows_of(made, 0)]).tolist() == [12, 12]
    shown = [
        pair
        for step in requested(made)
        for one in step
        for pair in zip(one.rows_B, one.draws_B, strict=True)  # type: ignore[arg-type]
    ]
    assert len(set(shown)) == len(shown) == 24
    assert {int(draw) for row, draw in shown if row >= 18} == {0, 1}


def augmented_epoch(spec: TrainingSpec, rows: pa.Table) -> dict[str, torch.Tensor]:
    """The images of an epoch as a training is shown them, by sample."""
    made = EpochOrder(spec, rows["label"].to_numpy(), rank=0, num_workers=1)
    prepared = [
        one for passes in FusedFeed(made, ImageLoader(spec, rows), None).steps(0, 0, PRESET) for one in passes
    ]
    shown = [row for one in prepared for row in one.rows_B.tolist()]
    images_BCHW = torch.cat([one.batch.images_BCHW for one in prepared])
    return {rows["sample_id"][row].as_py(): image for row, image in zip(shown, images_BCHW, strict=True)}


@pytest.mark.parametrize(("draw_version", "is_its_own"), [(2, True), (1, False)])
def test_how_an_image_is_augmented_does_not_depend_on_the_other_rows_or_their_order(
    spec: TrainingSpec, rows: pa.Table, draw_version: int, is_its_own: bool
) -> None:
    """It did in an older Convoy, and does in trainings that began there."""
    spec = spec.model_copy(update={"draw_version": draw_version})
    first = augmented_epoch(spec, rows)
    for other_spec, other_rows in (
        (spec, rows.slice(1)),
        (spec.model_copy(update={"recipe": recipe(seed=7)}), rows),
    ):
        other = augmented_epoch(other_spec, other_rows)
        same = [torch.equal(image, first[sample]) for sample, image in other.items()]
        assert all(same) is is_its_own


def test_a_worker_without_rows_is_an_error(spec: TrainingSpec) -> None:
    # 9 rows in batches of at most 8 are batches of 4 and 5.
    order(spec, 9, num_workers=4)
    with pytest.raises(ConfigError, match="a batch of 4 rows leaves some of 5 workers without any"):
        order(spec, 9, num_workers=5)


def test_the_fused_feed_gives_the_passes_of_every_step(spec: TrainingSpec, rows: pa.Table) -> None:
    spec = spec.model_copy(update={"recipe": recipe(accumulate=2)})
    made = EpochOrder(spec, rows["label"].to_numpy(), rank=0, num_workers=1)
    feed = FusedFeed(made, ImageLoader(spec, rows), None)
    steps = list(feed.steps(1, 1, PRESET))
    loader = ImageLoader(spec, rows)
    expected = list(made.requests(1, range(1, made.plan.num_steps), PRESET))
    assert [len(passes) for passes in steps] == [len(passes) for passes in expected] == [2, 2]
    for passes, requests in zip(steps, expected, strict=True):
        for one, its_request in zip(passes, requests, strict=True):
            assert torch.equal(one.batch.images_BCHW, loader.prepare(its_request).batch.images_BCHW)


def test_validation_has_every_row_on_one_worker_as_evaluation_shows_it(
    spec: TrainingSpec, rows: pa.Table
) -> None:
    found: list[PreparedBatch] = []
    for rank in range(3):
        loader = ImageLoader(spec, rows)
        feed = FusedFeed(order(spec, rows.num_rows, rank=rank, num_workers=3), loader, loader)
        found += feed.validation(0, PRESET)
    assert torch.cat([one.batch.labels_B for one in found]).tolist() == rows["label"].to_pylist()
    images = torch.cat([one.batch.images_BCHW for one in found])
    assert torch.equal(images, images_by_row(spec, rows, 8, None))


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "num_workers", "most_rows"),
    [(64, 1, 1, 64), (64, 4, 1, 16), (64, 4, 2, 8), (9, 2, 2, 3), (2, 8, 1, 1), (512, 1, 1, 128)],
)
def test_validation_shows_no_more_images_at_once_than_training_does(
    spec: TrainingSpec, batch_size: int, accumulate: int, num_workers: int, most_rows: int
) -> None:
    """A GPU that trains on eight large images at once has no room for 128."""
    settings = {"batch_size": batch_size, "recipe": recipe(accumulate=accumulate)}
    made = order(spec.model_copy(update=settings), 1000, num_workers=num_workers)
    requests = made.validation(500, PRESET)
    assert max(len(one.rows_B) for one in requests) == most_rows
    assert sum(len(one.rows_B) for one in requests) == 500 // num_workers
    assert made.most_validation_batches(500) == len(requests)


def test_the_watch_rests_while_a_batch_is_not_taken(
    spec: TrainingSpec, rows: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = NotingWatch()
    monkeypatch.setattr(image_loading, "StallWatch", lambda _limit_s: watch)
    ImageLoader(spec, rows).prepare(request([5, 4, 0]))
    assert watch.events == ["begin", *["moved"] * 3, "rest", "begin", "rest"]
