"""The batches of a split ingest through several streams of a real Ray Data, each beside the end of the one before."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from convoy.cluster import split_feed
from convoy.cluster.batch_feed import BatchFeed, EpochOrder, FusedFeed
from convoy.cluster.image_loading import ImageLoader, PreparedBatch
from convoy.cluster.split_feed import SplitFeed
from convoy.storage.stores import open_store
from convoy.vision.training_config import Phase
from made_training import PRESET, digit_rows, training_spec

pytestmark = pytest.mark.integration

NUM_EPOCHS = 3


def batches(feed: BatchFeed, first_step: int) -> Iterator[PreparedBatch]:
    """Those of a training from a step of its first epoch to its end, validations included."""
    for epoch in range(NUM_EPOCHS):
        for passes in feed.steps(epoch, first_step if epoch == 0 else 0, PRESET):
            yield from passes
        yield from feed.validation(epoch, PRESET)


def test_a_training_resumed_within_a_stream_gets_the_very_batches_of_its_own_threads(
    ray_cluster: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(split_feed, "_TASKS_A_STREAM", 6)
    monkeypatch.setattr(split_feed, "_TASKS_BEFORE_NEXT", 3)
    phase = Phase(name="train", epochs=NUM_EPOCHS, learning_rate=0.05)
    spec = training_spec(tmp_path / "workspace", digit_rows(tmp_path, 50), phases=(phase,))
    store = open_store(spec.workspace)
    train, val = (store.open_parquet(rows.key).read() for rows in (spec.train, spec.val) if rows)
    order = EpochOrder(spec, train["label"].to_numpy(), rank=0, num_workers=1)
    fused = FusedFeed(order, ImageLoader(spec, train), ImageLoader(spec, val))
    split = SplitFeed(spec, order, rank=0, num_workers=1)
    # An epoch is five steps and two batches of validation rows: no stream holds two epochs.
    num_batches = 0
    for ours, theirs in zip(batches(split, 3), batches(fused, 3), strict=True):
        assert torch.equal(ours.batch.images_BCHW, theirs.batch.images_BCHW)
        assert torch.equal(ours.batch.labels_B, theirs.batch.labels_B)
        assert ours.rows_B.tolist() == theirs.rows_B.tolist()
        num_batches += 1
    assert num_batches == 7 * NUM_EPOCHS - 3
