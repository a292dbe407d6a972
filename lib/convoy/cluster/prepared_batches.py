"""Images of a slice in batches, fetched and decoded in threads ahead of the network: what fused operators share.

Pixels go from the decoder into reused uint8 buffers, and never leave the worker.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from heapq import merge
from operator import itemgetter
from typing import Generic, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch import Tensor

from convoy.cluster.deadly_slices import ImageTrials, deadly_image
from convoy.cluster.decode_window import DecodeWindow, OwnThread, decode_threads
from convoy.cluster.stall_watch import StallWatch
from convoy.core.errors import DataError
from convoy.core.fingerprints import digest_bytes
from convoy.core.records import Reject, RejectCode, SampleRejected, Stage
from convoy.storage.commits import PartFile, SliceRecord, write_record
from convoy.storage.local_cache import LocalImageCache
from convoy.storage.parts import write_rejects
from convoy.storage.request_counts import REQUESTS
from convoy.storage.runs import RunFolder
from convoy.storage.samples import SampleReader
from convoy.vision.decode_rule import DecodeFlag, DecodeRule
from convoy.vision.decoding import decode_image, quiet_decoders
from convoy.vision.sniffing import ImageFormat, named_format

_BATCHES_AHEAD = 2
# What is worth counting, but leaves the pixels as they are.
_UNCHANGED = {DecodeFlag.ICC_PROFILE_IGNORED, DecodeFlag.MISNAMED}
# Images of a slice that a sound network may give no finite numbers for, though for none of the others.
_MOST_LOST_BY_CHANCE = 3

KeyT = TypeVar("KeyT", bound=Hashable)


@dataclass(slots=True)
class SliceImages:
    """A slice in work: its rows and what is known of their images so far.

    `usable_N[row]` is false until the row has an image; `content_digests` are those of its bytes, where they are asked
    for; `converted` are rows whose image had to be changed to be used; `bytes_read` counts the bytes of images, usable
    or not, `num_retries` repeated requests for images; `deadly` rows are not read, as that has ended workers.
    """

    rows: pa.Table
    started_unix_s: float
    deadly: frozenset[int] = frozenset()
    usable_N: NDArray[np.bool_] = field(init=False)
    content_digests: dict[int, bytes] = field(default_factory=dict)
    rejects: list[Reject] = field(default_factory=list)
    bytes_read: int = 0
    num_retries: int = 0
    converted: set[int] = field(default_factory=set)
    flags: Counter[str] = field(default_factory=Counter)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    first_row_unix_s: float = 0.0

    def __post_init__(self) -> None:
        """Nothing is known yet."""
        self.usable_N = np.zeros(self.rows.num_rows, np.bool_)

    def again(self) -> SliceImages:
        """The same slice, for another pass over its images."""
        return SliceImages(self.rows, self.started_unix_s, self.deadly)

    def reject_too(self, later: SliceImages) -> None:
        """Reject the rows too that only a later pass over them could not use."""
        place_of = {sample_id: row for row, sample_id in enumerate(self.rows["sample_id"].to_pylist())}
        for reject in later.rejects:
            row = place_of[reject.sample_id]
            if self.usable_N[row]:
                self.usable_N[row] = False
                self.rejects.append(reject)

    def reject_non_finite(self, outputs_ND: NDArray[np.floating], error: DataError) -> None:
        """Reject the images whose outputs are not all finite numbers. Raises `error` if they are several, and all."""
        lost = np.flatnonzero(self.usable_N & ~np.isfinite(outputs_ND).all(axis=1)).tolist()
        if len(lost) > _MOST_LOST_BY_CHANCE and len(lost) == self.usable_N.sum():
            raise error
        self.usable_N[lost] = False
        rejected = SampleRejected(RejectCode.NOT_FINITE, Stage.FORWARD, error.what)
        self.rejects += [_reject(self.rows, row, rejected) for row in lost]

    def add_effort(self, later: SliceImages) -> None:
        """Add the seconds, bytes and repeated requests that a later pass over the rows took."""
        self.bytes_read += later.bytes_read
        self.num_retries += later.num_retries
        for step, seconds in later.seconds.items():
            self.seconds[step] += seconds

    def through_network(self, started_s: float) -> None:
        """Note the seconds of a batch in the network, by the clock of `time.perf_counter`."""
        self.first_row_unix_s = self.first_row_unix_s or time.time()
        self.seconds["forward"] += time.perf_counter() - started_s

    def commit(
        self,
        folder: RunFolder,
        slice_name: str,
        write_parts: Callable[[str], dict[str, PartFile]],
        *,
        precision_effect: Mapping[str, float],
    ) -> SliceRecord:
        """Write the parts, by `write_parts(attempt)`, the rejects, and the record that makes both count."""
        started_s = time.perf_counter()
        retries_before = folder.store.num_retries
        attempt = secrets.token_hex(4)
        parts = write_parts(attempt)
        rejects = None
        if self.rejects:
            key = folder.key(f"rejects/{slice_name}-{attempt}.parquet")
            rejects = write_rejects(folder.store, key, self.rejects, attempt, folder.run_id)
        self.seconds["write"] = time.perf_counter() - started_s
        requests = REQUESTS.take()
        record = SliceRecord(
            run_id=folder.run_id,
            slice=slice_name,
            attempt=attempt,
            parts=parts,
            rejects=rejects,
            num_results=int(self.usable_N.sum()),
            num_rejects=len(self.rejects),
            reject_codes=Counter(reject.code.value for reject in self.rejects),
            flags=self.flags,
            seconds=self.seconds,
            started_unix_s=self.started_unix_s,
            first_row_unix_s=self.first_row_unix_s,
            finished_unix_s=time.time(),
            precision_effect=dict(precision_effect),
            bytes_read=self.bytes_read,
            num_retries=self.num_retries + folder.store.num_retries - retries_before,
            get_requests=requests.gets,
            put_requests=requests.puts,
        )
        write_record(folder.store, record)
        return record


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What a decode thread says of one image."""

    content_digest: bytes | None
    format: ImageFormat
    flags: frozenset[DecodeFlag]
    seconds: float


@dataclass(slots=True)
class ImageBatch(Generic[KeyT]):
    """Consecutive rows of a slice; `images[key][place]` holds what was made of the image of `rows[place]`."""

    rows: list[int]
    images: dict[KeyT, Tensor]
    prepared: list[Future[_Prepared | SampleRejected]] = field(default_factory=list)


class ImagePreparer(Generic[KeyT]):
    """Makes batches of slices. `fill(pixels_CHW, content_id, places)` writes one image into its places.

    It runs in decode threads, or without any in the thread that takes the batches, and may reject the image. The
    watch is told of each image that came, and of each batch that was taken.
    """

    def __init__(
        self,
        rule: DecodeRule,
        *,
        num_fetch_threads: int | None,
        num_decode_threads: int,
        fill: Callable[[Tensor, bytes, Mapping[KeyT, Tensor]], None],
        watch: StallWatch,
        digests_content: bool = False,
        cache: LocalImageCache | None = None,
    ) -> None:
        quiet_decoders()
        self._rule = rule
        self._reader = SampleReader(num_threads=num_fetch_threads, max_bytes=rule.max_bytes, cache=cache)
        self._decoders = decode_threads(num_decode_threads) if num_decode_threads else OwnThread()
        self._fill = fill
        self._watch = watch
        self._digests_content = digests_content

    def begin(self, rows: pa.Table, trials: ImageTrials | None) -> SliceImages:
        """A slice to make batches of. With `trials` its images are read and decoded one at a time first.

        What is deadly is found by that, or has been found by workers before.
        """
        started_unix_s = time.time()
        return SliceImages(rows, started_unix_s, self._try_alone(rows, trials) if trials else frozenset())

    def _try_alone(self, rows: pa.Table, trials: ImageTrials) -> frozenset[int]:
        """The rows of images that are known to be deadly, if no other one is: that would end this process here."""
        sample_ids = rows["sample_id"].to_pylist()
        known = set(trials.deadly)
        deadly = frozenset(row for row, sample_id in enumerate(sample_ids) if sample_id in known)
        images = _read_others(replace(self._reader, num_threads=1, window_reads=1), rows, deadly)
        for row, sample_id in enumerate(sample_ids):
            if row in deadly:
                continue
            trials.begin(sample_id)
            _, data = next(images)
            if not isinstance(data, SampleRejected):
                with suppress(SampleRejected):
                    decode_image(data, self._rule)
            self._watch.moved()
        trials.end()
        return deadly

    def batches(
        self, known: SliceImages, new_buffers: Callable[[], dict[KeyT, Tensor]], batch_size: int
    ) -> Iterator[ImageBatch[KeyT]]:
        """Batches whose images are ready, while the next ones are being fetched and decoded.

        Of encoded images no more bytes wait for a decoder than the reader may hold.
        What becomes of each row is noted in `known`. `new_buffers` gives empty batches; they are filled again as
        soon as the next batch is asked for.
        """
        for batch in self._settled(known, new_buffers, batch_size):
            yield batch
            self._watch.moved()

    def _settled(
        self, known: SliceImages, new_buffers: Callable[[], dict[KeyT, Tensor]], batch_size: int
    ) -> Iterator[ImageBatch[KeyT]]:
        free = [new_buffers() for _ in range(_BATCHES_AHEAD + 1)]
        content_ids = known.rows["content_id"].to_pylist()
        window = DecodeWindow(self._decoders, self._reader.window_bytes)
        waiting: deque[ImageBatch[KeyT]] = deque()
        retries_before = self._reader.num_retries
        for row, data in self._read(known):
            if not waiting or len(waiting[-1].rows) == batch_size:
                if not free:
                    batch = waiting.popleft()
                    self._settle(batch, known)
                    yield batch
                    free.append(batch.images)
                waiting.append(ImageBatch([], free.pop()))
            batch = waiting[-1]
            places = {key: buffer[len(batch.rows)] for key, buffer in batch.images.items()}
            batch.rows.append(row)
            if not isinstance(data, SampleRejected):
                known.bytes_read += len(data)
            batch.prepared.append(window.submit(self._prepare, data, content_ids[row], places))
        known.num_retries += self._reader.num_retries - retries_before
        for batch in waiting:
            self._settle(batch, known)
            yield batch

    def _read(self, known: SliceImages) -> Iterator[tuple[int, bytes | SampleRejected]]:
        """What the reader gives; `known` learns how long it was waited for."""
        deadly = ((row, deadly_image()) for row in sorted(known.deadly))
        images = merge(deadly, _read_others(self._reader, known.rows, known.deadly), key=itemgetter(0))
        while True:
            started_s = time.perf_counter()
            image = next(images, None)
            known.seconds["fetch"] += time.perf_counter() - started_s
            if image is None:
                return
            self._watch.moved()
            yield image

    def _prepare(self, data: bytes, content_id: bytes, places: Mapping[KeyT, Tensor]) -> _Prepared:
        """Decode one image into its places."""
        started_s = time.perf_counter()
        decoded = decode_image(data, self._rule)
        self._fill(decoded.pixels_CHW, content_id, places)
        content_digest = digest_bytes(data) if self._digests_content else None
        return _Prepared(content_digest, decoded.format, decoded.flags, time.perf_counter() - started_s)

    def _settle(self, batch: ImageBatch[KeyT], known: SliceImages) -> None:
        """Wait for the batch's images, and note which rows have one."""
        started_s = time.perf_counter()
        for row, future in zip(batch.rows, batch.prepared, strict=True):
            prepared = future.result()
            if isinstance(prepared, SampleRejected):
                known.rejects.append(_reject(known.rows, row, prepared))
                continue
            known.usable_N[row] = True
            if prepared.content_digest is not None:
                known.content_digests[row] = prepared.content_digest
            known.flags.update(prepared.flags)
            if _is_misnamed(known.rows, row, prepared.format):
                known.flags[DecodeFlag.MISNAMED] += 1
            if prepared.flags - _UNCHANGED:
                known.converted.add(row)
            known.seconds["decode"] += prepared.seconds
        known.seconds["wait"] += time.perf_counter() - started_s


def _is_misnamed(rows: pa.Table, row: int, image_format: ImageFormat) -> bool:
    """Whether the name of a sample, or that of its object, promises another format than its bytes have."""
    names = (rows[column][row].as_py() for column in ("sample_id", "uri"))
    promised = next((named for name in names if (named := named_format(name))), image_format)
    return promised is not image_format


def _read_others(
    reader: SampleReader, rows: pa.Table, deadly: frozenset[int]
) -> Iterator[tuple[int, bytes | SampleRejected]]:
    """What the reader gives of the rows that are not deadly."""
    others = [row for row in range(rows.num_rows) if row not in deadly]
    for place, image in reader.read(rows.take(others) if deadly else rows):
        yield others[place], image


def _reject(rows: pa.Table, row: int, rejected: SampleRejected) -> Reject:
    sample = rows.slice(row, 1).select(["sample_id", "uri", "etag", "content_id"]).to_pylist()[0]
    return Reject(**sample, stage=rejected.stage, code=rejected.code, reason=rejected.reason)
