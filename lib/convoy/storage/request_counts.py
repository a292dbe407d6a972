"""How many requests this process has sent to object stores, as a bill counts them."""

from __future__ import annotations

import threading
from typing import NamedTuple

_READING = {"GET", "HEAD"}
# Deleting is free.
_WRITING = {"PUT", "POST"}


class RequestCounts(NamedTuple):
    """Requests that read, and those that write; repeated ones count again."""

    gets: int = 0
    puts: int = 0


class RequestMeter:
    """Counts the requests of all stores of a process. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = RequestCounts()

    def count(self, method: str) -> None:
        """Hear of a request."""
        with self._lock:
            gets, puts = self._counts
            self._counts = RequestCounts(gets + (method in _READING), puts + (method in _WRITING))

    def take(self) -> RequestCounts:
        """The requests since the last call."""
        with self._lock:
            counts, self._counts = self._counts, RequestCounts()
        return counts


REQUESTS = RequestMeter()
