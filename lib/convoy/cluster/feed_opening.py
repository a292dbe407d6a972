"""Which feed a training worker gets: its own threads, or Ray Data workers beside it."""

from __future__ import annotations

import pyarrow as pa

from convoy.cluster.batch_feed import BatchFeed, EpochOrder, FusedFeed
from convoy.cluster.image_loading import ImageLoader
from convoy.cluster.split_feed import SplitFeed
from convoy.cluster.training_group import TrainingGroup
from convoy.cluster.training_spec import Ingest, TrainingSpec


def open_feed(
    spec: TrainingSpec, train: pa.Table, val: pa.Table | None, order: EpochOrder, group: TrainingGroup
) -> BatchFeed:
    """The feed of one worker for the spec's ingest, which is resolved and so no `auto`."""
    pin_memory = group.device.type == "cuda"
    if spec.ingest is Ingest.SPLIT:
        return SplitFeed(spec, order, rank=group.rank, num_workers=group.num_workers, pin_memory=pin_memory)
    val_loader = None if val is None else ImageLoader(spec, val, pin_memory=pin_memory)
    return FusedFeed(order, ImageLoader(spec, train, pin_memory=pin_memory), val_loader)
