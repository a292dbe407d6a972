"""The fused operator: a slice of keys in, part files and one record out. Pixels never leave the worker.

Fetch, decode and views run in threads ahead of the network; the network runs in the calling thread; the slice's
features are written once, at its end.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pyarrow as pa
from torch import Tensor

from convoy.cluster.deadly_slices import ImageTrials
from convoy.cluster.extraction_spec import ExtractionSpec, FeatureOutput
from convoy.cluster.kept_weights import open_network
from convoy.cluster.prepared_batches import ImageBatch, ImagePreparer, SliceImages
from convoy.cluster.slices import SliceTask
from convoy.cluster.stall_watch import StallWatch
from convoy.core.errors import DataError
from convoy.storage.commits import PartFile, SliceRecord, part_key
from convoy.storage.parts import FeatureRows, write_features
from convoy.storage.runs import FIRST_SLICE, RunFolder
from convoy.storage.stores import open_store
from convoy.vision.engine import FeatureEngine
from convoy.vision.engine_options import Precision
from convoy.vision.forward import casting_once
from convoy.vision.views import prepare_view


@dataclass(slots=True)
class _SliceResult:
    """What was computed of a slice so far."""

    images: SliceImages
    features_BD: dict[str, np.ndarray]
    is_precision_sample: bool
    precision_effect: dict[str, float] = field(default_factory=dict)


class FeatureExtractor:
    """A network on a device, with its readers and decoders; a call turns one slice into parts."""

    def __init__(self, spec: ExtractionSpec) -> None:
        self._spec = spec
        self._store = open_store(spec.workspace)
        self._folder = RunFolder(self._store, spec.run_id)
        drawn = [(output.augmentation, output.view) for output in spec.outputs]
        self._drawn = list(dict.fromkeys(drawn))
        # By number: a policy is slow to hash, and looked up for every image.
        self._number_of = {
            output.set_id: self._drawn.index(key) for output, key in zip(spec.outputs, drawn, strict=True)
        }
        self._watch = StallWatch(spec.stall_s)
        self._preparer: ImagePreparer[int] = ImagePreparer(
            spec.decode_rule,
            num_fetch_threads=spec.num_fetch_threads,
            num_decode_threads=spec.num_decode_threads,
            fill=self._fill,
            watch=self._watch,
            digests_content=True,
        )
        # A workspace on a mount may hang as images do.
        with self._watch.watching():
            network, axis = open_network(self._store, spec.backbone, spec.weights_key, spec.num_classes)
            taps = tuple(dict.fromkeys(output.tap for output in spec.outputs))
            self._engine = FeatureEngine(network, axis, spec.preset, taps=taps, options=spec.engine)
            with self._watch.timing_first_batch():
                features = self._engine.warm_up()
        self._widths = {tap: features_BD.shape[1] for tap, features_BD in features.items()}

    def __call__(self, task: SliceTask, trials: ImageTrials | None = None) -> SliceRecord:
        """Compute one slice, write its parts for the task's sets, its rejects, and the record that makes them count."""
        with self._watch.watching():
            return self._do(task, trials)

    def _do(self, task: SliceTask, trials: ImageTrials | None) -> SliceRecord:
        outputs = [output for output in self._spec.outputs if output.set_id in task.outputs]
        images = self._preparer.begin(self._folder.read_slice(task.slice), trials)
        result = self._new_result(task.slice, outputs, images)
        numbers = tuple(dict.fromkeys(self._number_of[output.set_id] for output in outputs))
        batches = self._preparer.batches(
            result.images, partial(self._new_buffers, numbers), self._spec.engine.batch_size
        )
        with casting_once(self._engine.device):
            for batch in batches:
                self._run_batch(batch, outputs, result)
        for output in outputs:
            _reject_non_finite(result.features_BD[output.set_id], output, result.images)
        return result.images.commit(
            self._folder,
            task.slice,
            partial(self._write_parts, task.slice, outputs, result),
            precision_effect=result.precision_effect,
        )

    def _new_result(
        self, slice_name: str, outputs: Sequence[FeatureOutput], images: SliceImages
    ) -> _SliceResult:
        features = {
            output.set_id: np.zeros((images.rows.num_rows, self._widths[output.tap]), self._spec.dtype)
            for output in outputs
        }
        # One batch of a run is enough: it costs a forward in float32.
        is_sample = slice_name == FIRST_SLICE and self._spec.engine.precision is not Precision.FP32
        return _SliceResult(images, features, is_sample)

    def _new_buffers(self, numbers: Sequence[int]) -> dict[int, Tensor]:
        return {number: self._engine.new_batch() for number in numbers}

    def _fill(self, pixels_CHW: Tensor, content_id: bytes, places: Mapping[int, Tensor]) -> None:
        for number, image_CHW in places.items():
            policy, view = self._drawn[number]
            prepare_view(
                pixels_CHW,
                self._spec.preset,
                image_CHW,
                view=view,
                policy=policy,
                content_id=content_id,
            )

    def _run_batch(
        self, batch: ImageBatch[int], outputs: Sequence[FeatureOutput], result: _SliceResult
    ) -> None:
        started_s = time.perf_counter()
        num_rows = len(batch.rows)
        rows = slice(batch.rows[0], batch.rows[0] + num_rows)
        for number, images in batch.images.items():
            self._watch.moved()
            features = self._engine.run(images)
            if result.is_precision_sample and not result.precision_effect:
                result.precision_effect = self._engine.precision_effect(images, features, num_rows)
            for output in outputs:
                if self._number_of[output.set_id] == number:
                    stored_BD = result.features_BD[output.set_id][rows]
                    # A value above the range of float16 becomes infinite, and its image a reject.
                    with np.errstate(over="ignore"):
                        stored_BD[:] = features[output.tap][:num_rows].cpu().numpy()
        result.images.through_network(started_s)

    def _write_parts(
        self, slice_name: str, outputs: Sequence[FeatureOutput], result: _SliceResult, attempt: str
    ) -> dict[str, PartFile]:
        return {output.set_id: self._write_part(slice_name, attempt, output, result) for output in outputs}

    def _write_part(
        self, slice_name: str, attempt: str, output: FeatureOutput, result: _SliceResult
    ) -> PartFile:
        images, usable_N = result.images, result.images.usable_N
        taken = images.rows.filter(pa.array(usable_N))
        rows = FeatureRows(
            sample_ids=taken["sample_id"].to_pylist(),
            content_ids=taken["content_id"].to_pylist(),
            content_digests=[images.content_digests[int(row)] for row in np.flatnonzero(usable_N)],
            view=output.view,
            features_BD=result.features_BD[output.set_id][usable_N],
        )
        return write_features(
            self._store, part_key(output.prefix, slice_name, attempt), rows, output.metadata
        )


def _reject_non_finite(features_BD: np.ndarray, output: FeatureOutput, images: SliceImages) -> None:
    error = DataError(
        f"the network gives features that {features_BD.dtype} cannot hold: not finite, or above its range",
        where=f"tap {output.tap}",
        next_step="store them with --set extraction.dtype=float32; if that fails too, check the weights",
    )
    images.reject_non_finite(features_BD, error)
