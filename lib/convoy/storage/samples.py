"""The bytes of a manifest's samples, read ahead by threads and given in order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from heapq import merge
from operator import itemgetter
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from convoy.core.records import SampleRejected
from convoy.storage.local_cache import LocalImageCache
from convoy.storage.read_ahead import Outcomes, Read, ReadWindow, joined_reads
from convoy.storage.row_groups import ImageColumn
from convoy.storage.sample_fetching import Address, check_size, fetch, read_or_reject, rejecting
from convoy.storage.stores import UriReader

_STORE_THREADS = 16
_FILE_THREADS = 2
# A file in the page cache is read in less time than it is handed over in, so threads read several small ones in a row:
# the window is at least so many reads, one for each thread, and one may take so small a part of its bytes.
_READS_OF_FILES, _PART_OF_BYTES = 4, 64
# What stands for a parquet file when its store is asked whether it still gives anything.
_START_OF_FILE = (0, 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleReader:
    """Reads slices of manifests. Thread-safe; keeps connections, but threads only while a slice is read.

    A sample of more than `max_bytes` is rejected. At most `window_reads` reads, and `window_bytes` bytes, are
    under way or waiting for the consumer; only a single read may be larger. Rows of parquet files that came along
    with an earlier one of their row group take as many bytes again. What the `cache` has is answered without a request,
    and what was fetched is offered to it; local files never go through it, but rows of local parquet files do, as each
    costs its row group. `num_threads` of None are as many as a slice has use for: requests to a store mostly wait, but
    reads of files do not, and their threads take Python's lock from the decoders.
    """

    num_threads: int | None = None
    max_bytes: int = 256 << 20
    window_reads: int = 128
    window_bytes: int = 256 << 20
    cache: LocalImageCache | None = None
    _uris: UriReader = field(default_factory=UriReader, init=False, repr=False)

    @property
    def num_retries(self) -> int:
        """How many requests for samples had to be repeated so far; parquet files open stores of their own."""
        return self._uris.num_retries

    def read(self, rows: pa.Table) -> Iterator[tuple[int, bytes | SampleRejected]]:
        """Each row's number and its image's bytes, or why there are none, in the order of the rows.

        Rejects are of stage fetch: gone, changed (another etag), access_denied, checksum_mismatch (twice in a row),
        unreadable (what the disk does not give, or a store that gives other objects, and a damaged parquet file, twice
        too); but empty and too_large are of stage decode, as a version's size never heals. A store that gives nothing,
        or fails for many objects in a row, is no fault of a sample: StoreUnavailable is raised, as are other errors of
        storage, ReadingRefused where every object is refused, and SourceMissing where none is there, as in a folder
        that is not mounted. Closing the iterator early stops its threads.
        """
        arrived: Outcomes = {}
        reads = _Sources(self._uris, self.max_bytes, self.cache, self.window_bytes).plan_reads(rows)
        window = self._window(reads, is_remote=pc.any(pc.starts_with(rows["uri"], pattern="s3://")).as_py())
        try:
            for row in range(rows.num_rows):
                # Reads come in the order of their first rows, so the next one has this row.
                if row not in arrived:
                    arrived.update(window.take())
                yield row, arrived.pop(row)
        finally:
            window.close()

    def _window(self, reads: Iterator[Read], *, is_remote: bool) -> ReadWindow:
        if is_remote:
            return ReadWindow(reads, self.num_threads or _STORE_THREADS, self.window_reads, self.window_bytes)
        num_threads = self.num_threads or _FILE_THREADS
        files_a_read = max(self.window_reads // max(_READS_OF_FILES, num_threads), 1)
        joined = joined_reads(reads, max_reads=files_a_read, max_bytes=self.window_bytes // _PART_OF_BYTES)
        max_reads = self.window_reads // files_a_read
        return ReadWindow(joined, num_threads, max_reads, self.window_bytes)


class _ParquetFile(NamedTuple):
    uri: str
    etag: str
    container_field: str


class _ParquetRow(NamedTuple):
    row_index: int
    content_id: bytes


@dataclass(frozen=True, slots=True)
class _Sources:
    """Plans and runs the reads of a slice: from the cache, or else from where the samples lie.

    A row group is read for those of its rows that come before `ahead_bytes` of images like its own.
    """

    uris: UriReader
    max_bytes: int
    cache: LocalImageCache | None
    ahead_bytes: int

    def plan_reads(self, rows: pa.Table) -> Iterator[Read]:
        """The reads of a slice in the order of their first rows. A parquet file is opened when it is due."""
        columns = (rows[name].to_pylist() for name in Address._fields)
        addresses = [Address(*values) for values in zip(*columns, strict=True)]
        rows_by_file: dict[_ParquetFile, dict[int, _ParquetRow]] = defaultdict(dict)
        for row, address in enumerate(addresses):
            if address.row_index is not None:
                parquet_row = _ParquetRow(address.row_index, address.content_id)
                rows_by_file[_file_of(address)][row] = parquet_row
        reads_by_file = {file: self._plan_file(file, wanted) for file, wanted in rows_by_file.items()}
        due_by_file: dict[_ParquetFile, tuple[int, Read] | None] = {}
        for row, address in enumerate(addresses):
            if address.row_index is None:
                # What is too large is not fetched, and takes no room.
                size_bytes = address.size_bytes or 0
                run = partial(self._read_sample, row, address)
                yield Read(size_bytes if size_bytes <= self.max_bytes else 0, run)
                continue
            file = _file_of(address)
            if file not in due_by_file:
                due_by_file[file] = next(reads_by_file[file], None)
            # Otherwise the row comes with an earlier one of its row group.
            if (due := due_by_file[file]) is not None and due[0] == row:
                del due_by_file[file]
                yield due[1]

    def _plan_file(self, file: _ParquetFile, wanted: dict[int, _ParquetRow]) -> Iterator[tuple[int, Read]]:
        """The reads of a parquet file and their first rows, in order; `wanted` are its rows by row of the slice."""
        cached_bytes = {}
        if (cache := self.cache) is not None:
            found = ((row, cache.find(parquet_row.content_id)) for row, parquet_row in wanted.items())
            cached_bytes = {row: size_bytes for row, size_bytes in found if size_bytes is not None}
        cached = (
            (row, Read(size_bytes, partial(self._read_cached, file, row, wanted[row])))
            for row, size_bytes in cached_bytes.items()
        )
        fetched = {row: parquet_row for row, parquet_row in wanted.items() if row not in cached_bytes}
        yield from merge(cached, self._plan_groups(file, fetched), key=itemgetter(0))

    def _plan_groups(self, file: _ParquetFile, wanted: dict[int, _ParquetRow]) -> Iterator[tuple[int, Read]]:
        """The reads of `wanted` rows from the file itself: each one row group, for those of its rows that come soon."""
        if not wanted:
            return
        try:
            with rejecting():
                opening = partial(ImageColumn, *file)
                column = read_or_reject(opening, file.uri, self.uris, num_images=len(wanted))
        except SampleRejected as rejected:
            outcomes: Outcomes = dict.fromkeys(wanted, rejected)
            yield next(iter(wanted)), Read(0, lambda: outcomes)
            return
        left_by_group: dict[int, dict[int, _ParquetRow]] = defaultdict(dict)
        for row, parquet_row in wanted.items():
            left_by_group[column.group_of(parquet_row.row_index)][row] = parquet_row
        for row, parquet_row in wanted.items():
            group = column.group_of(parquet_row.row_index)
            left = left_by_group[group]
            if row not in left:
                continue
            end = row + max(int(self.ahead_bytes / column.mean_bytes(group)), 1)
            members = {soon: left.pop(soon) for soon in list(left) if soon < end}
            yield row, Read(column.group_bytes(group), partial(self._read_group, column, group, members))

    def _read_sample(self, row: int, address: Address) -> Outcomes:
        # A file on a local disk is no farther than the cache itself.
        cache = self.cache if address.uri.startswith("s3://") else None
        try:
            with rejecting():
                check_size(address.size_bytes, self.max_bytes)
                data = cache.get(address.content_id) if cache else None
                if data is None:
                    data = fetch(address, self.uris)
                    if cache:
                        cache.offer(address.content_id, data)
                return {row: data}
        except SampleRejected as rejected:
            return {row: rejected}

    def _read_cached(self, file: _ParquetFile, row: int, wanted: _ParquetRow) -> Outcomes:
        data = self.cache.get(wanted.content_id) if self.cache else None
        if data is not None:
            return {row: self._checked(data)}
        # It was deleted, or found to be damaged, since the planning.
        ((_, read),) = self._plan_groups(file, {row: wanted})
        return read.run()

    def _read_group(self, column: ImageColumn, group: int, wanted: dict[int, _ParquetRow]) -> Outcomes:
        try:
            with rejecting():
                indices = [parquet_row.row_index for parquet_row in wanted.values()]
                reading = partial(column.read, group, indices)
                images = read_or_reject(reading, column.uri, self.uris, num_images=len(indices))
        except SampleRejected as rejected:
            return dict.fromkeys(wanted, rejected)
        self.uris.note_read(column.uri, _START_OF_FILE)
        outcomes: Outcomes = {}
        for (row, parquet_row), data in zip(wanted.items(), images, strict=True):
            outcomes[row] = self._checked(data)
            if self.cache and outcomes[row] is data:
                self.cache.offer(parquet_row.content_id, data)
        return outcomes

    def _checked(self, data: bytes) -> bytes | SampleRejected:
        try:
            check_size(len(data), self.max_bytes)
        except SampleRejected as rejected:
            return rejected
        return data


def _file_of(address: Address) -> _ParquetFile:
    return _ParquetFile(address.uri, address.etag, address.container_field or "")
