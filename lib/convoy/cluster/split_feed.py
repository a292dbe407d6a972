"""Batches from Ray Data workers on nodes without GPUs: step numbers go out, final-size uint8 images come back.

A step's rows are a pure function of the spec, so a number is all that the workers need to be told; whichever of
them prepares a step, and however often, the batch is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import ray.data
import torch

from convoy.cluster.batch_feed import EpochOrder
from convoy.cluster.image_loading import ImageLoader, PreparedBatch, RejectedRow
from convoy.cluster.ray_data import quiet_ray_data
from convoy.cluster.training_spec import CPUS_A_PREPARER, TrainingSpec
from convoy.storage.stores import open_store
from convoy.vision.learner import TrainBatch
from convoy.vision.presets import EvalPreset

# Tasks that an epoch is cut into at most: more would only make Ray's plan longer.
_MAX_BLOCKS = 1000


class SplitFeed:
    """The steps of one worker, prepared by `spec.num_preparers` Ray Data actors of its own."""

    def __init__(self, spec: TrainingSpec, order: EpochOrder, *, rank: int, num_workers: int) -> None:
        quiet_ray_data()
        self._spec, self._order = spec, order
        self._rank, self._num_workers = rank, num_workers

    def steps(self, epoch: int, first_step: int, preset: EvalPreset) -> Iterator[list[PreparedBatch]]:
        """The worker's passes of each step of an epoch, from a step on."""
        rows = self._dataset(epoch, first_step, preset).iter_rows()
        for _, passes in groupby(rows, key=itemgetter("step")):
            yield [_unpack(row, preset) for row in passes]

    def _dataset(self, epoch: int, first_step: int, preset: EvalPreset) -> Any:
        """One row a pass, in order; a row holds all images of the pass as bytes."""
        num_steps = self._order.plan.num_steps - first_step
        context = ray.data.DataContext.get_current().copy()
        context.execution_options.preserve_order = True
        # A block goes out as soon as it holds a batch, not when all steps of its task are done.
        context.target_max_block_size = self._order.plan.batch_size * 3 * preset.crop_px**2
        with ray.data.DataContext.current(context):
            # Not `range`: its tasks want a whole CPU, which training workers and preparers may not leave.
            steps = [{"step": step} for step in range(first_step, self._order.plan.num_steps)]
            numbers = ray.data.from_items(steps, override_num_blocks=min(num_steps, _MAX_BLOCKS))
            return numbers.map_batches(
                _Preparer,
                fn_constructor_args=(
                    self._spec.model_dump_json(),
                    self._rank,
                    self._num_workers,
                    epoch,
                    preset.model_dump_json(),
                ),
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=min(self._spec.num_preparers, num_steps)),
                num_cpus=CPUS_A_PREPARER,
            )


class _Preparer:
    """The actor that Ray Data makes for each place in the pool."""

    def __init__(self, spec_json: str, rank: int, num_workers: int, epoch: int, preset_json: str) -> None:
        spec = TrainingSpec.model_validate_json(spec_json)
        rows = open_store(spec.workspace).open_parquet(spec.train.key).read()
        self._order = EpochOrder(spec, rows["label"].to_numpy(), rank=rank, num_workers=num_workers)
        self._loader = ImageLoader(spec, rows)
        self._epoch = epoch
        self._preset = EvalPreset.model_validate_json(preset_json)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        step = int(batch["step"][0])
        (requests,) = self._order.requests(self._epoch, [step], self._preset)
        prepared = [self._loader.prepare(request) for request in requests]
        return {
            "step": [step] * len(prepared),
            # Channels last, as they lie in memory.
            "images": [_channels_last(one.batch.images_BCHW).tobytes() for one in prepared],
            "labels": [one.batch.labels_B.numpy().tobytes() for one in prepared],
            "weights": [one.batch.weights_B.numpy().tobytes() for one in prepared],
            "rejects": [[reject.model_dump_json() for reject in one.rejects] for one in prepared],
        }


def _channels_last(images_BCHW: torch.Tensor) -> np.ndarray:
    array: np.ndarray = images_BCHW.permute(0, 2, 3, 1).contiguous().numpy()
    return array


def _unpack(row: dict[str, Any], preset: EvalPreset) -> PreparedBatch:
    images = np.frombuffer(row["images"], np.uint8).copy().reshape(-1, preset.crop_px, preset.crop_px, 3)
    return PreparedBatch(
        batch=TrainBatch(
            images_BCHW=torch.from_numpy(images).permute(0, 3, 1, 2),
            labels_B=torch.from_numpy(np.frombuffer(row["labels"], np.int64).copy()),
            weights_B=torch.from_numpy(np.frombuffer(row["weights"], np.float32).copy()),
        ),
        rejects=[RejectedRow.model_validate_json(str(one)) for one in row["rejects"]],
    )
