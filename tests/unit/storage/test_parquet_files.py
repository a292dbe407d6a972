"""Parquet files over Python's own files: who reads them."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from convoy.storage.parquet_files import open_parquet_file


class WatchedFile(io.BytesIO):
    """Remembers which threads read it."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.threads: set[int] = set()

    def read(self, size: int | None = -1, /) -> bytes:
        self.threads.add(threading.get_ident())
        return super().read(size)


READS: dict[str, Callable[[Any], object]] = {
    "read": lambda file: file.read(columns=["c0", "c1", "c2"]),
    "read_row_group": lambda file: file.read_row_group(1),
    "iter_batches": lambda file: list(file.iter_batches(columns=["c3", "c4"])),
}


@pytest.fixture
def file() -> WatchedFile:
    written = io.BytesIO()
    table = pa.table({f"c{index}": pa.array(range(4000)) for index in range(8)})
    pq.write_table(table, written, row_group_size=500)
    return WatchedFile(written.getvalue())


@pytest.mark.parametrize("way", READS)
def test_files_of_python_are_read_by_the_thread_that_asks(file: WatchedFile, way: str) -> None:
    READS[way](open_parquet_file(file, where="here"))
    assert file.threads == {threading.get_ident()}


def test_arrows_own_way_would_read_them_elsewhere(file: WatchedFile) -> None:
    pq.ParquetFile(file).read()
    assert file.threads != {threading.get_ident()}
