"""The images in a parquet file, read one row group at a time."""

from __future__ import annotations

import errno
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import pyarrow as pa

from convoy.core.errors import DataError, ObjectUnreadable, StorageError
from convoy.core.records import RejectCode, SampleRejected, Stage
from convoy.storage.stores import open_object

# Arrow cannot hold more than 2 GiB of a struct at once. Repeated images are stored once, so rows are bounded too.
_BATCH_BYTES = 64 << 20
_BATCH_ROWS = 1024


class ImageColumn:
    """The column `container_field` of one version of a parquet file. Thread-safe.

    Raises SampleRejected for a file that is damaged or not of the version `etag`; errors of storage pass, among them
    ObjectUnreadable where the disk does not give it, and ObjectReplaced where it is replaced while it is read.
    """

    def __init__(self, uri: str, etag: str, container_field: str) -> None:
        self.uri, self._etag = uri, etag
        self._file = self._open()
        self._field = container_field
        # A ParquetFile may not be read by two threads at a time.
        self._lock = threading.Lock()
        metadata = self._file.metadata
        groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
        self._first_rows: list[int] = [0, *accumulate(group.num_rows for group in groups)]
        self._group_bytes = image_bytes_by_group(metadata, container_field)

    def group_of(self, row_index: int) -> int:
        """The row group that a row is in."""
        return bisect_right(self._first_rows, row_index) - 1

    def group_bytes(self, group: int) -> int:
        """The memory that all images of a row group take; while it is read, its stored bytes come on top."""
        return self._group_bytes[group]

    def mean_bytes(self, group: int) -> float:
        """The memory that one image of a row group takes, in the mean; at least 1."""
        return max(self._group_bytes[group] / self._num_rows(group), 1.0)

    def read(self, group: int, row_indices: Sequence[int]) -> list[bytes]:
        """The images of some rows of a row group; b"" where there is none.

        The group is read in batches, so that besides its stored bytes only these images are in memory.
        """
        images = self._read_group(group, sorted(set(row_indices)))
        return [images[index] for index in row_indices]

    def _num_rows(self, group: int) -> int:
        return self._first_rows[group + 1] - self._first_rows[group]

    def _open(self) -> Any:
        store, key = open_object(self.uri)
        try:
            file = store.open_parquet(key)
        except DataError as error:
            raise _unreadable(f"the parquet file is damaged: {error}") from error
        if store.head(key).etag != self._etag:
            raise SampleRejected(RejectCode.CHANGED, Stage.FETCH, "the parquet file is of another version")
        return file

    def _read_group(self, group: int, wanted: Sequence[int]) -> dict[int, bytes]:
        """The images of sorted rows. What comes back wrong is read once more, from the file opened anew."""
        with self._lock:
            try:
                return self._read_once(group, wanted)
            except (SampleRejected, OSError):
                self._file = self._open()
            try:
                return self._read_once(group, wanted)
            except OSError as error:
                what = f"the file system failed: {error.strerror or error}"
                if error.errno == errno.EIO:
                    raise ObjectUnreadable(what, where=self.uri) from error
                raise StorageError(what, where=self.uri, errno=error.errno) from error

    def _read_once(self, group: int, wanted: Sequence[int]) -> dict[int, bytes]:
        images: dict[int, bytes] = {}
        start = self._first_rows[group]
        try:
            for values in self._iter_batches(group):
                rows = wanted[len(images) : bisect_left(wanted, start + len(values))]
                images.update((row, values[row - start].as_py() or b"") for row in rows)
                if len(images) == len(wanted):
                    break
                start += len(values)
        except DataError as error:
            raise _unreadable(error.what) from error
        return images

    def _iter_batches(self, group: int) -> Iterator[Any]:
        rows_of_bytes = self._num_rows(group) * _BATCH_BYTES // max(self._group_bytes[group], 1)
        batch_size = min(max(rows_of_bytes, 1), _BATCH_ROWS)
        for batch in self._file.iter_batches(batch_size, row_groups=[group], columns=[self._field]):
            values = batch.column(0)
            yield values.field("bytes") if pa.types.is_struct(values.type) else values


def image_bytes_by_group(metadata: Any, container_field: str) -> list[int]:
    """The bytes that the images of each row group of a file take in memory, from its metadata."""
    columns = [metadata.schema.column(index).path for index in range(metadata.num_columns)]
    column = columns.index(container_field)
    groups = (metadata.row_group(index) for index in range(metadata.num_row_groups))
    return [group.column(column).total_uncompressed_size for group in groups]


def _unreadable(reason: str) -> SampleRejected:
    return SampleRejected(RejectCode.UNREADABLE, Stage.FETCH, reason)
