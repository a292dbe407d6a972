"""What a training worker is told. Free of torch and Ray."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Literal

import pyarrow as pa
from pydantic import PositiveFloat, PositiveInt

from convoy.core.config import StrictModel
from convoy.storage.local_cache import LocalCacheOptions
from convoy.storage.object_store import ObjectStore
from convoy.vision.augmentation_policy import AugmentationPolicy
from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.decode_rule import DecodeRule
from convoy.vision.presets import EvalPreset, at_resolution
from convoy.vision.training_config import Distillation, Phase, Recipe

# That of trainings that begin now; see `TrainingSpec.draw_version`.
DRAW_VERSION: Literal[1, 2] = 2
# What a preparing worker reserves: less than the CPUs that its threads use, so that it fits beside others.
CPUS_A_PREPARER = 0.5
# What it takes of Ray's object store: a batch that it prepares, and two that wait for an earlier one or the training.
_BATCHES_A_PREPARER = 3
# More rows at once would validate no faster.
_MOST_VALIDATION_ROWS = 128


class Ingest(StrEnum):
    """Where images become batches.

    `fused`: in threads of the training worker, so that pixels never leave its process. `split`: in Ray Data
    workers, on any node, which send final-size uint8 batches. `auto`: split where there are GPUs, nodes without
    GPUs beside them or four CPUs or more to each GPU, CPUs for workers of two threads, and room for the batches in
    Ray's object store; else fused. Rows of parquet files are fused: a batch alone would read a row group for nearly
    every image.
    """

    AUTO = "auto"
    FUSED = "fused"
    SPLIT = "split"


class TrainingRows(StrictModel):
    """The frozen rows of a split, in a parquet file with the manifest's columns."""

    key: str
    num_rows: int

    def read(self, store: ObjectStore) -> pa.Table:
        """All of them: about 250 bytes a row."""
        table: pa.Table = store.open_parquet(self.key).read()
        return table


class TeacherRows(StrictModel):
    """What a teacher says of the training rows, in their order, in a parquet file; and how much that counts."""

    key: str
    distillation: Distillation


class TrainingSpec(StrictModel):
    """Everything that determines a training, as JSON; the rest is read from the workspace.

    Freeze depths of the phases are resolved to numbers, their learning rates are those for the number of workers,
    and the precision is no `auto`.
    """

    # By what an image's augmentation is drawn beside seed and epoch; a training ends with what it began with. 2: by its
    # sample, and how often that came before in the epoch. 1: by its content and its place in the epoch's order, so that
    # one image more changes that of all.
    draw_version: Literal[1, 2] = DRAW_VERSION
    workspace: str
    run_id: str
    backbone: BackboneConfig
    initial_weights_key: str
    preset: EvalPreset
    decode_rule: DecodeRule
    augmentation: AugmentationPolicy
    recipe: Recipe
    phases: tuple[Phase, ...]
    class_weights: tuple[float, ...] | None
    balanced_sampling: bool
    train: TrainingRows
    val: TrainingRows | None
    teacher: TeacherRows | None = None
    batch_size: PositiveInt
    checkpoint_steps: PositiveInt
    checkpoint_minutes: PositiveFloat
    ingest: Ingest
    num_preparers: PositiveInt
    num_threads: PositiveInt
    num_fetch_threads: PositiveInt | None
    stall_s: PositiveFloat
    local_cache: LocalCacheOptions | None

    def validation_batch_rows(self, num_workers: int) -> int:
        """Rows of a validation batch on one of so many workers: as many as it has room for, having trained on them."""
        pass_rows = _share(_share(self.batch_size, num_workers), self.recipe.accumulate)
        return min(_MOST_VALIDATION_ROWS, pass_rows)

    def largest_batch_bytes(self, num_workers: int) -> int:
        """Bytes of the images of the largest batch that one of so many workers gets, validation included."""
        return largest_batch_bytes(self.preset, self.phases, self.batch_size, num_workers)


def largest_batch_bytes(
    preset: EvalPreset, phases: Sequence[Phase], batch_size: int, num_workers: int
) -> int:
    """Bytes of the images of one worker's share of a batch, at the highest resolution of the phases."""
    most_px = max(at_resolution(preset, phase.resolution_px).crop_px for phase in phases)
    return _share(batch_size, num_workers) * 3 * most_px**2


def object_store_bytes(num_preparers: int, batch_bytes: int) -> int:
    """What the preparers of a worker take of Ray's object store, for batches of at most so many bytes."""
    return _BATCHES_A_PREPARER * num_preparers * batch_bytes


def _share(num_rows: int, num_workers: int) -> int:
    """Rows of the worker that has most."""
    return -(-num_rows // num_workers)
