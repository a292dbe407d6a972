"""Parquet files over Python's own files: who reads them."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from convoy.core.errors import DataError
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


@pytest.mark.parametrize("way", READS)
@pytest.mark.parametrize("is_local", [True, False])
def test_a_damaged_page_is_named(file: WatchedFile, tmp_path: Path, way: str, is_local: bool) -> None:
    written = io.BytesIO()
    table = pq.read_table(file)
    pq.write_table(table, written, row_group_size=500, write_page_checksum=True, compression="none")
    data = bytearray(written.getvalue())
    columns = pq.ParquetFile(written).metadata.row_group(1)
    for index in range(8):
        # The last byte of a page is of its values.
        column = columns.column(index)
        start = column.dictionary_page_offset or column.data_page_offset
        data[start + column.total_compressed_size - 1] ^= 1
    path = tmp_path / "a.parquet"
    path.write_bytes(data)
    opened = open_parquet_file(str(path) if is_local else io.BytesIO(data), where="here")
    with pytest.raises(DataError, match="damaged") as caught:
        READS[way](opened)
    assert caught.value.where == "here"


def test_arrows_own_way_would_read_them_elsewhere(file: WatchedFile) -> None:
    pq.ParquetFile(file).read()
    assert file.threads != {threading.get_ident()}
