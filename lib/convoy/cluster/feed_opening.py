"""Which feed a training worker gets: its own threads, or Ray Data workers on other nodes."""

from __future__ import annotations

import pyarrow as pa

from convoy.cluster.batch_feed import EpochOrder, FusedFeed, StepFeed
from convoy.cluster.image_loading import ImageLoader
from convoy.cluster.split_feed import SplitFeed
from convoy.cluster.training_group import TrainingGroup
from convoy.cluster.training_spec import Ingest, TrainingSpec


def open_feed(spec: TrainingSpec, rows: pa.Table, order: EpochOrder, group: TrainingGroup) -> StepFeed:
    """The feed of one worker for the spec's ingest, which is resolved and so no `auto`."""
    if spec.ingest is Ingest.SPLIT:
        return SplitFeed(spec, order, rank=group.rank, num_workers=group.num_workers)
    return FusedFeed(order, ImageLoader(spec, rows, pin_memory=group.device.type == "cuda"))
