"""Reads that threads run ahead of their consumer, and that come back in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from convoy.core.records import SampleRejected

# By row of the slice: the bytes, or why there are none.
Outcomes = dict[int, bytes | SampleRejected]


@dataclass(frozen=True, slots=True)
class Read:
    """One request, and the memory that its outcomes take."""

    size_bytes: int
    run: Callable[[], Outcomes]


def joined_reads(reads: Iterator[Read], *, max_reads: int, max_bytes: int) -> Iterator[Read]:
    """Consecutive reads as one, as far as counts and bytes allow; a single read may be larger."""
    group: list[Read] = []
    size_bytes = 0
    for read in reads:
        if group and (len(group) == max_reads or size_bytes + read.size_bytes > max_bytes):
            yield _joined(group)
            group, size_bytes = [], 0
        group.append(read)
        size_bytes += read.size_bytes
    if group:
        yield _joined(group)


def _joined(reads: Sequence[Read]) -> Read:
    return Read(sum(read.size_bytes for read in reads), partial(_run_all, tuple(reads)))


def _run_all(reads: Sequence[Read]) -> Outcomes:
    return {row: outcome for read in reads for row, outcome in read.run().items()}


class ReadWindow:
    """Runs reads ahead of their consumer, in threads, as far as counts and bytes allow.

    A single read may be larger than `max_bytes`; then it is the only one.
    """

    def __init__(self, reads: Iterator[Read], num_threads: int, max_reads: int, max_bytes: int) -> None:
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="fetch")
        self._reads = reads
        self._next = next(reads, None)
        self._running: deque[tuple[int, Future[Outcomes]]] = deque()
        self._max_reads, self._max_bytes = max_reads, max_bytes
        self._bytes = 0

    def take(self) -> Outcomes:
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

    def _has_room(self, read: Read) -> bool:
        if not self._running:
            return True
        return len(self._running) < self._max_reads and self._bytes + read.size_bytes <= self._max_bytes
