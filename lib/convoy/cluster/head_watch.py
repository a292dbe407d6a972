"""A cluster whose head is gone stops the job in order, as one that can go on.

Ray itself ends a driver from C++, where Python is not asked, with exit code 1, when its head has not answered for a
minute.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from convoy.core.errors import ExitCode

# After so many seconds without its head Ray ends a driver; clusters whose head may come back set it higher.
_RAYS_LIMIT, _RAYS_DEFAULT_S = "RAY_gcs_rpc_server_reconnect_timeout_s", 60.0
# Shares of that: the head may be restarted meanwhile; then the job stops in order, which frees its run for the next.
_WAITING_SHARE, _STOPPING_SHARE = 0.75, 0.15
_BETWEEN_LOOKS_S = 2.0
_CONNECTING_S = 5.0


@contextmanager
def watching_head(address: str) -> Iterator[None]:
    """While the block runs, the head at `host:port` must answer.

    Without an answer in time this process gets a SIGTERM, which stops a job in order; if that takes too long, as with
    calls to Ray that wait for the head, it exits with `ExitCode.STOPPED_RESUMABLE` where it is.
    """
    limit_s = float(os.environ.get(_RAYS_LIMIT) or _RAYS_DEFAULT_S)
    watch = HeadWatch(address, gone_after_s=_WAITING_SHARE * limit_s, stopping_s=_STOPPING_SHARE * limit_s)
    is_over = threading.Event()
    threading.Thread(target=watch.run, args=(is_over,), name="head watch", daemon=True).start()
    try:
        yield
    finally:
        is_over.set()


class HeadWatch:
    """Looks whether somebody listens at an address; gone is who has not for `gone_after_s` seconds on end."""

    def __init__(self, address: str, *, gone_after_s: float, stopping_s: float) -> None:
        self._address, self._gone_after_s, self._stopping_s = address, gone_after_s, stopping_s

    def run(self, is_over: threading.Event) -> None:
        """Return once it is over; of a head that is gone, stop this process, within `stopping_s` seconds."""
        answered_s = time.monotonic()
        while not is_over.wait(_BETWEEN_LOOKS_S):
            if self._is_answered():
                answered_s = time.monotonic()
            elif time.monotonic() - answered_s >= self._gone_after_s:
                self._stop_process(is_over)
                return

    def _is_answered(self) -> bool:
        host, _, port = self._address.rpartition(":")
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECTING_S):
                return True
        except OSError:
            return False

    def _stop_process(self, is_over: threading.Event) -> None:
        logging.getLogger(__name__).error(
            "the head of the Ray cluster at %s has not answered for %.0f s: run the same command again once there is"
            " a cluster",
            self._address,
            self._gone_after_s,
        )
        os.kill(os.getpid(), signal.SIGTERM)
        if not is_over.wait(self._stopping_s):
            os._exit(ExitCode.STOPPED_RESUMABLE)
