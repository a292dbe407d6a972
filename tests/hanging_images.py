"""An image whose bytes do not come: a worker that reads it waits, for as long as a test needs its job to live."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

PATIENCE_S = 120.0


class HangingImage:
    """Puts a named pipe in the place of a local image that is in a frozen dataset."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._kept = path.with_name(f"{path.name}.kept")
        self._pipe = path.with_name(f"{path.name}.pipe")
        os.rename(path, self._kept)
        os.mkfifo(self._pipe)
        os.link(self._pipe, path)

    def restore(self) -> None:
        """Put the image back, with its time; who waits already waits on."""
        os.replace(self._kept, self._path)

    def release(self) -> None:
        """Let the worker that waits go on, with no bytes: its sample is a reject, as the file has changed."""

        def is_open() -> bool:
            try:
                os.close(os.open(self._pipe, os.O_WRONLY | os.O_NONBLOCK))
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                return False
            return True

        wait_until(is_open)


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds; an AssertionError if it never does."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come to that"
        time.sleep(0.1)
