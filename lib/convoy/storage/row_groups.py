"""The images in a parquet file, read one row group at a time."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterable
from itertools import accumulate
from typing import Any

import pyarrow as pa

from convoy.core.errors import DataError, StorageError
from convoy.core.records import RejectCode, SampleRejected, Stage
from convoy.storage.parquet_files import is_damage
from convoy.storage.stores import open_object


class ImageColumn:
    """The column `container_field` of one version of a parquet file. Thread-safe.

    Raises SampleRejected for a file that is damaged, or not of the version `etag`; errors of storage pass.
    """

    def __init__(self, uri: str, etag: str, container_field: str) -> None:
        self._uri, self._etag = uri, etag
        self._file = self._open()
        self._field = container_field
        # A ParquetFile may not be read by two threads at a time.
        self._lock = threading.Lock()
        metadata = self._file.metadata
        groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
        self._first_rows: list[int] = [0, *accumulate(group.num_rows for group in groups)]
        columns = [metadata.schema.column(index).path for index in range(metadata.num_columns)]
        column = columns.index(container_field)
        self._group_bytes: list[int] = [group.column(column).total_uncompressed_size for group in groups]

    def group_of(self, row_index: int) -> int:
        """The row group that a row is in."""
        return bisect_right(self._first_rows, row_index) - 1

    def group_bytes(self, group: int) -> int:
        """The memory that reading a row group takes."""
        return self._group_bytes[group]

    def read(self, group: int, row_indices: Iterable[int]) -> list[bytes]:
        """The images of some rows of a row group; b"" where there is none."""
        table = self._read_group(group)
        values: Any = table.column(0)
        if pa.types.is_struct(values.type):
            values = pa.chunked_array([chunk.field("bytes") for chunk in values.chunks])
        first_row = self._first_rows[group]
        return [values[index - first_row].as_py() or b"" for index in row_indices]

    def _open(self) -> Any:
        store, key = open_object(self._uri)
        try:
            file = store.open_parquet(key)
        except DataError as error:
            raise _unreadable(error) from error
        if store.head(key).etag != self._etag:
            raise SampleRejected(RejectCode.CHANGED, Stage.FETCH, "the parquet file is of another version")
        return file

    def _read_group(self, group: int) -> pa.Table:
        """The column of a row group. What comes back wrong is read once more, from the file opened anew."""
        with self._lock:
            try:
                return self._read_once(group)
            except (SampleRejected, OSError):
                self._file = self._open()
            try:
                return self._read_once(group)
            except OSError as error:
                what = f"the file system failed: {error.strerror or error}"
                raise StorageError(what, where=self._uri, errno=error.errno) from error

    def _read_once(self, group: int) -> pa.Table:
        try:
            return self._file.read_row_group(group, columns=[self._field])
        except (pa.ArrowException, OSError) as error:
            if is_damage(error):
                raise _unreadable(error) from error
            raise


def _unreadable(error: Exception) -> SampleRejected:
    return SampleRejected(RejectCode.UNREADABLE, Stage.FETCH, f"the parquet file is damaged: {error}")
