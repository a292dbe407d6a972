"""Rows in, uint8 batches out: fetch, decode and augment in threads, ahead of whoever takes the batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from convoy.cluster.decode_window import DecodeWindow, decode_threads
from convoy.cluster.running_ahead import ahead
from convoy.cluster.stall_watch import StallWatch
from convoy.cluster.training_spec import TrainingSpec
from convoy.core.config import StrictModel
from convoy.core.randomness import generator
from convoy.core.records import RejectCode, SampleRejected, Stage
from convoy.storage.local_cache import LocalImageCache
from convoy.storage.samples import SampleReader
from convoy.vision.augmentation import augment
from convoy.vision.augmentation_policy import EVAL_VIEW
from convoy.vision.decoding import decode_image, quiet_decoders
from convoy.vision.learner import TrainBatch
from convoy.vision.presets import EvalPreset
from convoy.vision.views import prepare_view

_BATCHES_AHEAD = 3
# Rows whose bytes lie in parquet files are read a row group at a time, so a read must not span a whole epoch.
_ROWS_A_READ = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRequest:
    """Rows of a table that make one batch. With an epoch they are augmented, without one shown as in evaluation.

    `draws_B` are numbers that tell a row's repetitions within the epoch apart.
    """

    rows_B: np.ndarray
    preset: EvalPreset
    epoch: int | None = None
    draws_B: np.ndarray | None = None


class RejectedRow(StrictModel):
    """A row of the table that could not be used, and why."""

    row: int
    stage: Stage
    code: RejectCode
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PreparedBatch:
    """The usable images of a request and their rows, and the rows that could not be used.

    `notes` are what a person should know of how images come here, anew with every batch.
    """

    batch: TrainBatch
    rows_B: np.ndarray
    rejects: list[RejectedRow]
    notes: tuple[str, ...] = ()


class ImageLoader:
    """Prepares batches of the rows of one table. `load` may be called again and again."""

    def __init__(
        self, spec: TrainingSpec, rows: pa.Table, *, num_threads: int | None = None, pin_memory: bool = False
    ) -> None:
        quiet_decoders()
        self._spec = spec
        self._rows = rows
        self._labels_N = rows["label"].to_numpy().astype(np.int64)
        self._weights_N = rows["weight"].to_numpy().astype(np.float32)
        self._content_ids = rows["content_id"]
        self._drawn_ids = rows["content_id" if spec.draw_version == 1 else "sample_id"]
        self._reader = SampleReader(
            num_threads=spec.num_fetch_threads,
            max_bytes=spec.decode_rule.max_bytes,
            cache=LocalImageCache.of(spec.local_cache),
        )
        self._decoders = decode_threads(num_threads or spec.num_threads)
        self._pin_memory = pin_memory
        self._watch = StallWatch(spec.stall_s)

    @property
    def num_rows(self) -> int:
        """Rows of the table."""
        return len(self._labels_N)

    def load(self, requests: Iterable[BatchRequest]) -> Iterator[PreparedBatch]:
        """The batches in the order of the requests, prepared ahead by a thread. Closing it early stops the thread."""
        return ahead(self._prepare_all(requests), _BATCHES_AHEAD)

    def prepare(self, request: BatchRequest) -> PreparedBatch:
        """One batch, in the calling thread."""
        (batch,) = self._prepare_all([request])
        return batch

    def _prepare_all(self, requests: Iterable[BatchRequest]) -> Iterator[PreparedBatch]:
        """Batches whose images are ready, while decoders work on the next ones.

        The watch is on while one is prepared, not while nobody takes it.
        """
        with self._watch.watching():
            for batch in self._settled(requests):
                self._watch.rest()
                yield batch
                self._watch.begin()

    def _settled(self, requests: Iterable[BatchRequest]) -> Iterator[PreparedBatch]:
        waiting: list[_Pending] = []
        for pending in self._submitted(requests):
            waiting.append(pending)
            if len(waiting) > _BATCHES_AHEAD:
                yield self._settle(waiting.pop(0))
        for pending in waiting:
            yield self._settle(pending)

    def _submitted(self, requests: Iterable[BatchRequest]) -> Iterator[_Pending]:
        for group in _grouped(requests, _ROWS_A_READ):
            table = self._rows.take(pa.array(np.concatenate([request.rows_B for request in group])))
            read = self._reader.read(table)
            window = DecodeWindow(self._decoders, self._reader.window_bytes)
            for request in group:
                images = self._new_batch(request)
                decoded = [
                    window.submit(self._decode, data, request, slot, images[slot])
                    for slot, (_, data) in enumerate(self._noting(islice(read, len(request.rows_B))))
                ]
                yield _Pending(request, images, decoded)

    def _noting(
        self, read: Iterator[tuple[int, bytes | SampleRejected]]
    ) -> Iterator[tuple[int, bytes | SampleRejected]]:
        """What was read, of which the watch is told."""
        for item in read:
            self._watch.moved()
            yield item

    def _new_batch(self, request: BatchRequest) -> Tensor:
        shape = (len(request.rows_B), 3, request.preset.crop_px, request.preset.crop_px)
        return torch.empty(
            shape, dtype=torch.uint8, memory_format=torch.channels_last, pin_memory=self._pin_memory
        )

    def _decode(self, data: bytes, request: BatchRequest, slot: int, image_CHW: Tensor) -> None:
        """Decode one image into its slot; runs in a decode thread."""
        pixels_CHW = decode_image(data, self._spec.decode_rule).pixels_CHW
        row = int(request.rows_B[slot])
        if request.epoch is None or request.draws_B is None:
            content_id = self._content_ids[row].as_py()
            prepare_view(
                pixels_CHW, request.preset, image_CHW, view=EVAL_VIEW, policy=None, content_id=content_id
            )
            return
        drawn_id = self._drawn_ids[row].as_py()
        rng = generator(self._spec.augmentation.seed, request.epoch, drawn_id, int(request.draws_B[slot]))
        augment(pixels_CHW, request.preset, image_CHW, policy=self._spec.augmentation, rng=rng)

    def _settle(self, pending: _Pending) -> PreparedBatch:
        usable, rejects = [], []
        for slot, future in enumerate(pending.decoded):
            rejected = future.result()
            if rejected is None:
                usable.append(slot)
                continue
            row = int(pending.request.rows_B[slot])
            rejects.append(
                RejectedRow(row=row, stage=rejected.stage, code=rejected.code, reason=rejected.reason)
            )
        rows_B, images_BCHW = pending.request.rows_B, pending.images_BCHW
        if rejects:
            rows_B, images_BCHW = rows_B[usable], images_BCHW[usable]
        batch = TrainBatch(
            images_BCHW=images_BCHW,
            labels_B=torch.from_numpy(self._labels_N[rows_B]),
            weights_B=torch.from_numpy(self._weights_N[rows_B]),
            num_missing=len(rejects),
        )
        return PreparedBatch(batch=batch, rows_B=rows_B, rejects=rejects, notes=self._cache_notes())

    def _cache_notes(self) -> tuple[str, ...]:
        cache = self._reader.cache
        reasons = () if cache is None else cache.counts.notes
        return tuple(f"image cache of a node (local_cache): {reason}" for reason in reasons)


@dataclass(frozen=True, slots=True)
class _Pending:
    """A request whose images decoders are filling in."""

    request: BatchRequest
    images_BCHW: Tensor
    decoded: Sequence[Future[SampleRejected | None]]


def _grouped(requests: Iterable[BatchRequest], num_rows: int) -> Iterator[list[BatchRequest]]:
    """Consecutive requests that have about so many rows together."""
    group: list[BatchRequest] = []
    for request in requests:
        group.append(request)
        if sum(len(one.rows_B) for one in group) >= num_rows:
            yield group
            group = []
    if group:
        yield group
