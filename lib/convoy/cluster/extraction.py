"""The fused operator: a slice of keys in, part files and one record out. Pixels never leave the worker.

Fetch, decode and views run in threads ahead of the network and write into reused uint8 batches; the network
runs in the calling thread; the slice's features are written once, at its end.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter, defaultdict, deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from torch import Tensor

from convoy.cluster.extraction_spec import ExtractionSpec, FeatureOutput
from convoy.core.batching import batched
from convoy.core.errors import DataError
from convoy.core.fingerprints import digest_bytes
from convoy.core.records import Reject, SampleRejected
from convoy.storage.commits import PartFile, SliceRecord, part_key, write_record
from convoy.storage.parts import FeatureRows, write_features, write_rejects
from convoy.storage.runs import FIRST_SLICE, RunFolder
from convoy.storage.samples import SampleReader
from convoy.storage.stores import open_store
from convoy.vision.backbones import build_network, depth_axis
from convoy.vision.decode_rule import DecodeFlag
from convoy.vision.decoding import decode_image, quiet_decoders
from convoy.vision.engine import FeatureEngine
from convoy.vision.engine_options import Precision
from convoy.vision.views import prepare_view
from convoy.vision.weights import load_weights, read_state_dict

_BATCHES_AHEAD = 2


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What a decode thread says of one image."""

    content_digest: bytes
    flags: frozenset[DecodeFlag]
    seconds: float


@dataclass(slots=True)
class _Batch:
    """Consecutive rows of a slice, and a uint8 buffer a view that decode threads are filling."""

    rows: list[int]
    images: dict[int, Tensor]
    prepared: list[Future[_Prepared]] = field(default_factory=list)


@dataclass(slots=True)
class _SliceResult:
    """What is known of the rows of a slice so far. `content_digests[row]` is None until the row has features."""

    rows: pa.Table
    features_BD: dict[str, np.ndarray]
    content_digests: list[bytes | None]
    started_unix_s: float
    is_precision_sample: bool
    rejects: list[Reject] = field(default_factory=list)
    flags: Counter[str] = field(default_factory=Counter)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    first_row_unix_s: float = 0.0
    precision_effect: dict[str, float] = field(default_factory=dict)


class FeatureExtractor:
    """A network on a device, with its readers and decoders; `extract` turns one slice into parts."""

    def __init__(self, spec: ExtractionSpec) -> None:
        quiet_decoders()
        self._spec = spec
        self._store = open_store(spec.workspace)
        self._folder = RunFolder(self._store, spec.run_id)
        self._reader = SampleReader(num_threads=spec.num_fetch_threads, max_bytes=spec.decode_rule.max_bytes)
        self._decoders = ThreadPoolExecutor(spec.num_decode_threads, "decode")
        network = build_network(spec.backbone)
        axis = depth_axis(spec.backbone, network)
        load_weights(network, read_state_dict(self._store.get(spec.weights_key).data))
        taps = tuple(dict.fromkeys(output.tap for output in spec.outputs))
        self._engine = FeatureEngine(network, axis, spec.preset, taps=taps, options=spec.engine)
        self._widths = {tap: features.shape[1] for tap, features in self._engine.warm_up().items()}

    def extract(self, slice_name: str, set_ids: Collection[str]) -> SliceRecord:
        """Compute one slice, write its parts for these sets, its rejects, and the record that makes them count."""
        started_unix_s = time.time()
        outputs = [output for output in self._spec.outputs if output.set_id in set_ids]
        result = self._new_result(slice_name, outputs, started_unix_s)
        views = tuple(dict.fromkeys(output.view for output in outputs))
        for batch in self._prepared_batches(result, views):
            self._run_batch(batch, outputs, result)
        return self._write(slice_name, outputs, result)

    def _new_result(
        self, slice_name: str, outputs: Sequence[FeatureOutput], started_unix_s: float
    ) -> _SliceResult:
        rows = self._folder.read_slice(slice_name)
        features = {
            output.set_id: np.zeros((rows.num_rows, self._widths[output.tap]), self._spec.dtype)
            for output in outputs
        }
        return _SliceResult(
            rows,
            features,
            [None] * rows.num_rows,
            started_unix_s,
            # One batch of a run is enough: it costs a forward in float32.
            is_precision_sample=slice_name == FIRST_SLICE
            and self._spec.engine.precision is not Precision.FP32,
        )

    def _prepared_batches(self, result: _SliceResult, views: Collection[int]) -> Iterator[_Batch]:
        """Batches whose images are ready, while the next ones are being fetched and decoded."""
        free = [{view: self._engine.new_batch() for view in views} for _ in range(_BATCHES_AHEAD + 1)]
        content_ids = result.rows["content_id"].to_pylist()
        waiting: deque[_Batch] = deque()
        for rows in batched(self._reader.read(result.rows), self._spec.engine.batch_size):
            if not free:
                batch = waiting.popleft()
                self._settle(batch, result)
                yield batch
                free.append(batch.images)
            batch = _Batch([row for row, _ in rows], free.pop())
            for slot, (row, data) in enumerate(rows):
                images = {view: buffer[slot] for view, buffer in batch.images.items()}
                batch.prepared.append(self._decoders.submit(self._prepare, data, content_ids[row], images))
            waiting.append(batch)
        for batch in waiting:
            self._settle(batch, result)
            yield batch

    def _prepare(
        self, data: bytes | SampleRejected, content_id: bytes, images_CHW: dict[int, Tensor]
    ) -> _Prepared:
        """Decode one image into its slots; runs in a decode thread."""
        if isinstance(data, SampleRejected):
            raise data
        started_s = time.perf_counter()
        decoded = decode_image(data, self._spec.decode_rule)
        for view, image_CHW in images_CHW.items():
            prepare_view(
                decoded.pixels_CHW,
                self._spec.preset,
                image_CHW,
                view=view,
                policy=self._spec.augmentation,
                content_id=content_id,
            )
        return _Prepared(digest_bytes(data), decoded.flags, time.perf_counter() - started_s)

    def _settle(self, batch: _Batch, result: _SliceResult) -> None:
        """Wait for the batch's images, and note which rows have one."""
        started_s = time.perf_counter()
        for row, future in zip(batch.rows, batch.prepared, strict=True):
            try:
                prepared = future.result()
            except SampleRejected as rejected:
                result.rejects.append(_reject(result.rows, row, rejected))
                continue
            result.content_digests[row] = prepared.content_digest
            result.flags.update(prepared.flags)
            result.seconds["decode"] += prepared.seconds
        result.seconds["wait"] += time.perf_counter() - started_s

    def _run_batch(self, batch: _Batch, outputs: Sequence[FeatureOutput], result: _SliceResult) -> None:
        started_s = time.perf_counter()
        num_rows = len(batch.rows)
        rows = slice(batch.rows[0], batch.rows[0] + num_rows)
        for view, images in batch.images.items():
            features = self._engine.run(images)
            if result.is_precision_sample and not result.precision_effect:
                result.precision_effect = self._engine.precision_effect(images, features, num_rows)
            for output in outputs:
                if output.view == view:
                    stored_BD = result.features_BD[output.set_id][rows]
                    with np.errstate(over="ignore"):
                        stored_BD[:] = features[output.tap][:num_rows].cpu().numpy()
                    _refuse_non_finite(stored_BD, output)
        result.first_row_unix_s = result.first_row_unix_s or time.time()
        result.seconds["forward"] += time.perf_counter() - started_s

    def _write(self, slice_name: str, outputs: Sequence[FeatureOutput], result: _SliceResult) -> SliceRecord:
        started_s = time.perf_counter()
        attempt = secrets.token_hex(4)
        parts = {output.set_id: self._write_part(slice_name, attempt, output, result) for output in outputs}
        rejects = self._write_rejects(slice_name, attempt, result)
        result.seconds["write"] = time.perf_counter() - started_s
        record = SliceRecord(
            run_id=self._spec.run_id,
            slice=slice_name,
            attempt=attempt,
            parts=parts,
            rejects=rejects,
            num_results=sum(content is not None for content in result.content_digests),
            num_rejects=len(result.rejects),
            reject_codes=Counter(reject.code.value for reject in result.rejects),
            flags=result.flags,
            seconds=result.seconds,
            started_unix_s=result.started_unix_s,
            first_row_unix_s=result.first_row_unix_s,
            finished_unix_s=time.time(),
            precision_effect=result.precision_effect,
        )
        write_record(self._store, record)
        return record

    def _write_part(
        self, slice_name: str, attempt: str, output: FeatureOutput, result: _SliceResult
    ) -> PartFile:
        valid = np.array([content is not None for content in result.content_digests], dtype=bool)
        taken = result.rows.filter(pa.array(valid))
        rows = FeatureRows(
            sample_ids=taken["sample_id"].to_pylist(),
            content_ids=taken["content_id"].to_pylist(),
            content_digests=[content for content in result.content_digests if content is not None],
            view=output.view,
            features_BD=result.features_BD[output.set_id][valid],
        )
        key = part_key(output.prefix, slice_name, attempt)
        return write_features(self._store, key, rows, output.metadata)

    def _write_rejects(self, slice_name: str, attempt: str, result: _SliceResult) -> PartFile | None:
        if not result.rejects:
            return None
        key = self._folder.key(f"rejects/{slice_name}-{attempt}.parquet")
        return write_rejects(self._store, key, result.rejects, attempt, {"convoy.run_id": self._spec.run_id})


def _refuse_non_finite(features_BD: np.ndarray, output: FeatureOutput) -> None:
    if not np.isfinite(features_BD).all():
        raise DataError(
            f"the network gives features that {features_BD.dtype} cannot hold: not finite, or above its range",
            where=f"tap {output.tap}",
            next_step="store them with --set extraction.dtype=float32; if that fails too, check the weights",
        )


def _reject(rows: pa.Table, row: int, rejected: SampleRejected) -> Reject:
    sample = rows.slice(row, 1).select(["sample_id", "uri", "etag", "content_id"]).to_pylist()[0]
    return Reject(**sample, stage=rejected.stage, code=rejected.code, reason=rejected.reason)
