"""The bytes of a manifest's samples, read ahead by threads and given in order."""

from __future__ import annotations

import hashlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import pyarrow as pa

from convoy.core.errors import AccessDenied, ObjectNotFound, StorageError
from convoy.core.records import RejectCode, SampleRejected, Stage
from convoy.storage.object_store import Blob
from convoy.storage.row_groups import ImageColumn
from convoy.storage.stores import UriReader, open_object

# By row of the slice: the bytes, or why there are none.
_Outcomes = dict[int, bytes | SampleRejected]


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleReader:
    """Reads slices of manifests. Thread-safe; keeps connections, but threads only while a slice is read.

    A sample of more than `max_bytes` is rejected. At most `window_reads` reads, and `window_bytes` bytes, are
    under way or waiting for the consumer; only a single read may be larger.
    """

    num_threads: int = 16
    max_bytes: int = 256 << 20
    window_reads: int = 128
    window_bytes: int = 256 << 20
    _uris: UriReader = field(default_factory=UriReader, init=False, repr=False)

    def read(self, rows: pa.Table) -> Iterator[tuple[int, bytes | SampleRejected]]:
        """Each row's number and its image's bytes, or why there are none, in the order of the rows.

        Rejects are of stage fetch: gone, changed (another etag), access_denied, checksum_mismatch (twice in a
        row), unreadable (a damaged parquet file); but empty and too_large are of stage decode, as a version's
        size never heals. A store that keeps failing is no fault of a sample: StoreUnavailable is raised, as is
        any other error of storage. Closing the iterator early stops its threads.
        """
        arrived: _Outcomes = {}
        reads = _plan_reads(rows, self._uris, self.max_bytes)
        window = _Window(reads, self.num_threads, self.window_reads, self.window_bytes)
        try:
            for row in range(rows.num_rows):
                # Reads come in the order of their first rows, so the next one has this row.
                if row not in arrived:
                    arrived.update(window.take())
                yield row, arrived.pop(row)
        finally:
            window.close()


@dataclass(frozen=True, slots=True)
class _Read:
    """One request: a sample, or all rows of the slice in one row group of a parquet file."""

    size_bytes: int
    run: Callable[[], _Outcomes]


class _Window:
    """Runs reads ahead of their consumer, in threads, as far as counts and bytes allow."""

    def __init__(self, reads: Iterator[_Read], num_threads: int, max_reads: int, max_bytes: int) -> None:
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="fetch")
        self._reads = reads
        self._next = next(reads, None)
        self._running: deque[tuple[int, Future[_Outcomes]]] = deque()
        self._max_reads, self._max_bytes = max_reads, max_bytes
        self._bytes = 0

    def take(self) -> _Outcomes:
        """What the next read in order brings; its errors are raised here."""
        self._fill()
        size_bytes, future = self._running.popleft()
        outcomes = future.result()
        self._bytes -= size_bytes
        return outcomes

    def close(self) -> None:
        """Drop what has not begun, and wait for what has."""
        self._pool.shutdown(cancel_futures=True)

    def _fill(self) -> None:
        while self._next is not None and self._has_room(self._next):
            self._running.append((self._next.size_bytes, self._pool.submit(self._next.run)))
            self._bytes += self._next.size_bytes
            self._next = next(self._reads, None)

    def _has_room(self, read: _Read) -> bool:
        if not self._running:
            return True
        return len(self._running) < self._max_reads and self._bytes + read.size_bytes <= self._max_bytes


class _Address(NamedTuple):
    """The columns of a manifest that say where a sample's bytes are, and by what they are checked."""

    uri: str
    etag: str
    size_bytes: int | None
    offset_bytes: int | None
    row_index: int | None
    container_field: str | None
    checksum: str | None


def _plan_reads(rows: pa.Table, uris: UriReader, max_bytes: int) -> Iterator[_Read]:
    """The reads of a slice in the order of their first rows. A parquet file is opened when it is due."""
    columns = (rows[name].to_pylist() for name in _Address._fields)
    addresses = [_Address(*values) for values in zip(*columns, strict=True)]
    rows_by_file: dict[tuple[str, str, str], dict[int, int]] = defaultdict(dict)
    for row, address in enumerate(addresses):
        if address.row_index is not None:
            rows_by_file[_file_of(address)][row] = address.row_index
    reads_by_first_row: dict[int, _Read] = {}
    for row, address in enumerate(addresses):
        if address.row_index is None:
            # What is too large is not fetched, and takes no room.
            size_bytes = address.size_bytes or 0
            run = partial(_run_sample, row, address, uris, max_bytes)
            yield _Read(size_bytes if size_bytes <= max_bytes else 0, run)
            continue
        if wanted := rows_by_file.pop(_file_of(address), None):
            reads_by_first_row.update(_plan_file(*_file_of(address), wanted, max_bytes))
        if row in reads_by_first_row:
            yield reads_by_first_row.pop(row)


def _file_of(address: _Address) -> tuple[str, str, str]:
    return address.uri, address.etag, address.container_field or ""


def _plan_file(
    uri: str, etag: str, container_field: str, wanted: dict[int, int], max_bytes: int
) -> Iterator[tuple[int, _Read]]:
    """The reads of a parquet file by their first rows; `wanted` are rows of the file by row of the slice."""
    try:
        with _rejecting():
            column = ImageColumn(uri, etag, container_field)
    except SampleRejected as rejected:
        outcomes: _Outcomes = dict.fromkeys(wanted, rejected)
        yield next(iter(wanted)), _Read(0, lambda: outcomes)
        return
    by_group: dict[int, dict[int, int]] = defaultdict(dict)
    for row, row_index in wanted.items():
        by_group[column.group_of(row_index)][row] = row_index
    for group, members in by_group.items():
        run = partial(_run_group, column, group, members, max_bytes)
        yield next(iter(members)), _Read(column.group_bytes(group), run)


def _run_sample(row: int, address: _Address, uris: UriReader, max_bytes: int) -> _Outcomes:
    try:
        with _rejecting():
            _check_size(address.size_bytes, max_bytes)
            return {row: _fetch(address, uris)}
    except SampleRejected as rejected:
        return {row: rejected}


def _run_group(column: ImageColumn, group: int, wanted: dict[int, int], max_bytes: int) -> _Outcomes:
    try:
        with _rejecting():
            images = column.read(group, wanted.values())
    except SampleRejected as rejected:
        return dict.fromkeys(wanted, rejected)
    outcomes: _Outcomes = {}
    for row, data in zip(wanted, images, strict=True):
        try:
            _check_size(len(data), max_bytes)
            outcomes[row] = data
        except SampleRejected as rejected:
            outcomes[row] = rejected
    return outcomes


def _fetch(address: _Address, uris: UriReader) -> bytes:
    """The bytes of an object, or of a range of one. What comes back wrong is read once more."""
    for _attempt in range(2):
        blob = _get(address, uris)
        if blob.etag != address.etag:
            raise _reject(RejectCode.CHANGED, f"version {blob.etag} instead of {address.etag}")
        if _is_intact(blob, address):
            return blob.data
    raise _reject(RejectCode.CHECKSUM_MISMATCH, f"the bytes do not have the checksum {address.checksum}")


def _get(address: _Address, uris: UriReader) -> Blob:
    if address.offset_bytes is None or address.size_bytes is None:
        return uris.get(address.uri)
    try:
        return uris.get(address.uri, byte_range=(address.offset_bytes, address.size_bytes))
    except StorageError as error:
        if error.retryable or isinstance(error, ObjectNotFound | AccessDenied):
            raise
        # A range beyond the end: the shard may have been replaced by a shorter one.
        store, key = open_object(address.uri)
        etag = store.head(key).etag
        if etag == address.etag:
            raise
        return Blob(data=b"", etag=etag)


def _is_intact(blob: Blob, address: _Address) -> bool:
    # A listing took the etag for an MD5, but of an encrypted object it is none, as the Blob then says.
    is_guess = address.checksum == f"md5:{address.etag}" and not blob.checksum
    if address.checksum is None or is_guess:
        return True
    algorithm, _, expected = address.checksum.partition(":")
    return hashlib.new(algorithm, blob.data, usedforsecurity=False).hexdigest() == expected


@contextmanager
def _rejecting() -> Iterator[None]:
    """Make rejects of the errors that one sample can have; others concern the store, and pass."""
    try:
        yield
    except ObjectNotFound as error:
        raise _reject(RejectCode.GONE, error.what) from None
    except AccessDenied as error:
        raise _reject(RejectCode.ACCESS_DENIED, error.what) from None


def _check_size(size_bytes: int | None, max_bytes: int) -> None:
    if size_bytes == 0:
        raise SampleRejected(RejectCode.EMPTY, Stage.DECODE, "there are no bytes")
    if size_bytes is not None and size_bytes > max_bytes:
        reason = f"{size_bytes} bytes; the limit is {max_bytes}"
        raise SampleRejected(RejectCode.TOO_LARGE, Stage.DECODE, reason)


def _reject(code: RejectCode, reason: str) -> SampleRejected:
    return SampleRejected(code, Stage.FETCH, reason)
