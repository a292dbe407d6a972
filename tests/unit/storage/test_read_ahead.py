"""Reads that are handed over together."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from convoy.core.records import RejectCode, SampleRejected, Stage
from convoy.storage.read_ahead import Outcomes, Read, ReadWindow, joined_reads


def reads_of(*sizes_bytes: int) -> Iterator[Read]:
    """A row each, whose data say which thread read it."""

    def run(row: int) -> Outcomes:
        return {row: threading.current_thread().name.encode()}

    for row, size_bytes in enumerate(sizes_bytes):
        yield Read(size_bytes, lambda row=row: run(row))


def sizes_of(*sizes_bytes: int, max_reads: int = 3, max_bytes: int = 100) -> list[int]:
    return [
        read.size_bytes
        for read in joined_reads(reads_of(*sizes_bytes), max_reads=max_reads, max_bytes=max_bytes)
    ]


def test_small_reads_are_joined_as_far_as_counts_and_bytes_allow() -> None:
    assert sizes_of(10, 10, 10, 10) == [30, 10]
    assert sizes_of(60, 40, 1) == [100, 1]
    assert sizes_of(10, 500, 10) == [10, 500, 10]
    assert sizes_of(10, 10, max_reads=1) == [10, 10]
    assert sizes_of() == []


def test_every_outcome_of_a_joined_read_comes_from_one_thread_in_the_order_of_the_rows() -> None:
    window = ReadWindow(joined_reads(reads_of(*[1] * 8), max_reads=4, max_bytes=100), 2, 2, 100)
    for first in (0, 4):
        outcomes = window.take()
        assert list(outcomes) == [first, first + 1, first + 2, first + 3]
        assert len(set(outcomes.values())) == 1
    window.close()


def test_a_row_that_could_not_be_read_takes_none_with_it() -> None:
    gone = SampleRejected(RejectCode.GONE, Stage.FETCH, "made")
    reads = iter([Read(1, lambda: {0: b"a"}), Read(1, lambda: {1: gone}), Read(1, lambda: {2: b"c"})])
    (joined,) = joined_reads(reads, max_reads=3, max_bytes=3)
    assert joined.run() == {0: b"a", 1: gone, 2: b"c"}


def test_an_error_of_the_store_is_the_whole_reads() -> None:
    def fail() -> Outcomes:
        raise OSError("the disk is gone")

    (joined,) = joined_reads(iter([Read(1, lambda: {0: b"a"}), Read(1, fail)]), max_reads=2, max_bytes=2)
    window = ReadWindow(iter([joined]), 1, 1, 2)
    with pytest.raises(OSError, match="gone"):
        window.take()
    window.close()
