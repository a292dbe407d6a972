"""Resident memory of a job's driver and workers while it runs, by Linux' own account."""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Self

_PERIOD_S = 0.25
_WORKER_TITLE = "SliceWorker"
_PAGE_MIB = os.sysconf("SC_PAGE_SIZE") / 2**20


class MemorySampler:
    """Samples the processes below this one while it is entered.

    `samples` are (seconds since 1970, MiB of the driver, MiB of all slice workers together); pages that processes
    share count for each of them.
    """

    def __init__(self) -> None:
        self.samples: list[tuple[float, float, float]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(_PERIOD_S):
            children = _children()
            below = list(children[os.getpid()])
            driver_mib = sum(map(_resident_mib, below))
            for pid in below:
                below.extend(children[pid])
            workers_mib = sum(_resident_mib(pid) for pid in below if _WORKER_TITLE in _title(pid))
            self.samples.append((time.time(), driver_mib, workers_mib))


def growth(
    samples: list[tuple[float, float, float]], first_unix_s: float, last_unix_s: float
) -> float | None:
    """Peak memory of the workers in the last third of a time over that in the middle one; None for too few samples."""
    third_s = (last_unix_s - first_unix_s) / 3
    middle = [mib for at, _, mib in samples if first_unix_s + third_s <= at < last_unix_s - third_s]
    last = [mib for at, _, mib in samples if last_unix_s - third_s <= at <= last_unix_s]
    return max(last) / max(middle) if middle and last and max(middle) else None


def _children() -> dict[int, list[int]]:
    """The children of every process."""
    found: dict[int, list[int]] = defaultdict(list)
    for name in os.listdir("/proc"):
        if name.isdigit():
            # A process may end while it is looked at.
            with suppress(OSError):
                fields = Path("/proc", name, "stat").read_text().rpartition(")")[2].split()
                found[int(fields[1])].append(int(name))
    return found


def _resident_mib(pid: int) -> float:
    with suppress(OSError):
        return int(Path("/proc", str(pid), "statm").read_text().split()[1]) * _PAGE_MIB
    return 0.0


def _title(pid: int) -> str:
    with suppress(OSError):
        return Path("/proc", str(pid), "cmdline").read_text(errors="replace")
    return ""
