"""Parquet files over object stores: only the ranges that are asked for are read."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from convoy.core.errors import DataError, ObjectReplaced, StorageError
from convoy.storage.object_store import ObjectStore

# Neighbouring small columns come with one request; a larger read is one request of its own.
BUFFER_BYTES = 1 << 20
_DAMAGED = "the parquet file is damaged"


class ObjectReader(io.RawIOBase):
    """One version of an object as a seekable file; a read is a range request, with the store's own retries.

    An object of up to BUFFER_BYTES is read whole and once, so that the store compares its checksum.
    Raises ObjectReplaced if the object is replaced between two reads.
    """

    def __init__(self, store: ObjectStore, key: str) -> None:
        super().__init__()
        self._store = store
        self._info = store.head(key)
        self._position = 0
        self._whole: bytes | None = None

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """The position in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move without reading; returns the position in bytes."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._info.size_bytes}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, up to the end of the object; returns the number of bytes."""
        num_bytes = min(len(buffer), self._info.size_bytes - self._position)
        if num_bytes <= 0:
            return 0
        buffer[:num_bytes] = self._read(self._position, num_bytes)
        self._position += num_bytes
        return num_bytes

    def _read(self, first: int, num_bytes: int) -> bytes:
        if self._info.size_bytes > BUFFER_BYTES:
            return self._get((first, num_bytes))
        if self._whole is None:
            self._whole = self._get()
        return self._whole[first : first + num_bytes]

    def _get(self, byte_range: tuple[int, int] | None = None) -> bytes:
        key = self._info.key
        try:
            blob = self._store.get(key, byte_range=byte_range)
        except StorageError as error:
            # A range beyond the end, if the new version is shorter.
            if error.retryable or self._store.head(key).etag == self._info.etag:
                raise
        else:
            if blob.etag == self._info.etag:
                return blob.data
        raise ObjectReplaced(
            "the object was replaced while it was read",
            where=self._store.uri(key),
            next_step="run the command again",
        )


def buffered_reader(store: ObjectStore, key: str) -> io.BufferedReader:
    """The object as a buffered binary file; ObjectNotFound if there is none."""
    return io.BufferedReader(ObjectReader(store, key), BUFFER_BYTES)


class _CheckedFile(pq.ParquetFile):  # type: ignore[misc] # pyarrow has no types
    """Names itself where its bytes are damaged. A file of Python's is read in the caller's thread.

    One of Arrow's threads that lets go of Python's bytes while the process ends aborts it.
    """

    def __init__(self, source: Any, *, where: str) -> None:
        self._where = where
        self._threads = {} if isinstance(source, str) else {"use_threads": False}
        options = {} if isinstance(source, str) else {"pre_buffer": False}
        with _naming_damage(where, "this is not a whole parquet file"):
            super().__init__(source, page_checksum_verification=True, **options)

    def read(self, *args: Any, **options: Any) -> pa.Table:
        with _naming_damage(self._where, _DAMAGED):
            return super().read(*args, **options, **self._threads)

    def read_row_group(self, *args: Any, **options: Any) -> pa.Table:
        with _naming_damage(self._where, _DAMAGED):
            return super().read_row_group(*args, **options, **self._threads)

    def iter_batches(self, *args: Any, **options: Any) -> Iterator[Any]:
        with _naming_damage(self._where, _DAMAGED):
            yield from super().iter_batches(*args, **options, **self._threads)


def open_parquet_file(source: str | io.BufferedIOBase | pa.BufferReader, *, where: str) -> Any:
    """A pyarrow.parquet.ParquetFile of a path or a binary file; DataError if it is not one.

    Pages that have a checksum are compared with it as they are read; a damaged one is a DataError too.
    """
    return _CheckedFile(source, where=where)


@contextmanager
def _naming_damage(where: str, what: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if not _is_damage(error):
            raise
        raise DataError(
            f"{what} ({error})",
            where=where,
            next_step="read it once more by the same command; if it stays so, write it again, or remove it",
        ) from error


def _is_damage(error: Exception) -> bool:
    """Whether an error of Arrow's is about the bytes of a file, and not about memory or a file system.

    For damaged pages and footers it raises OSError too, but with a number only where the system gave one.
    """
    return not isinstance(error, MemoryError) and getattr(error, "errno", None) is None
