"""A worker in which nothing moves ends itself: Ray replaces a dead one, and waits for one that hangs for ever.

Requests to object stores have deadlines. A read from a mounted folder, a decoder and a device have none.
"""

from __future__ import annotations

import faulthandler
import time
from collections.abc import Iterator
from contextlib import contextmanager

DEFAULT_STALL_MINUTES = 30.0
_STDERR = 2
# Arming starts a thread: not for every image.
_ARMED_FOR_S = 1.0
# A batch may take so many times as long as the first one did, which was of zeros.
_TIMES_THE_FIRST_BATCH = 10


class StallWatch:
    """Ends this process, with the stacks of its threads in its log, when for `limit_s` seconds nothing has `moved`.

    It does so from a thread without Python, which does not wait for the lock that a decoder may hang with. A process
    has one such thread: of two watches, the one that was the last to move or rest has it.
    """

    def __init__(self, limit_s: float = 60 * DEFAULT_STALL_MINUTES) -> None:
        self._limit_s = limit_s
        self._armed_s: float | None = None

    @contextmanager
    def timing_first_batch(self) -> Iterator[None]:
        """The first batch is run: later ones may take longer than the limit if this one takes long."""
        started_s = time.monotonic()
        yield
        self._limit_s = max(self._limit_s, _TIMES_THE_FIRST_BATCH * (time.monotonic() - started_s))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Something has to move from now on, until the end."""
        self.begin()
        try:
            yield
        finally:
            self.rest()

    def begin(self) -> None:
        """Something has to move from now on."""
        faulthandler.dump_traceback_later(self._limit_s, exit=True, file=_STDERR)
        self._armed_s = time.monotonic()

    def moved(self) -> None:
        """Something has moved: if something has to, the seconds count anew."""
        if self._armed_s is None:
            return
        if time.monotonic() - self._armed_s > min(_ARMED_FOR_S, self._limit_s / 10):
            self.begin()

    def rest(self) -> None:
        """Nothing has to move until the next beginning."""
        faulthandler.cancel_dump_traceback_later()
        self._armed_s = None
