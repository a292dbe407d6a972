"""Memory and CPU time of a job's driver, its workers, and Ray beside them, by Linux' own account."""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Self

from convoy.storage.commits import SliceRecord

_PERIOD_S = 0.25
_WORKER_TITLE = "SliceWorker"
_PAGE_MIB = os.sysconf("SC_PAGE_SIZE") / 2**20
_TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")


class Sample(NamedTuple):
    """One look: when, MiB of the processes that this one started (the driver), and of all slice workers together.

    Pages that processes share count for each of them. `others_cpu_s` are the seconds of a core that this process and
    all below it have taken, the slice workers left out: those of the driver and of Ray.
    """

    at_unix_s: float
    driver_mib: float
    workers_mib: float
    others_cpu_s: float


class ProcessSampler:
    """Samples this process and all below it while it is entered; there are no samples where it is not Linux."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        if not Path("/proc/self/stat").exists():
            return
        workers: set[int] = set()
        while not self._stop.wait(_PERIOD_S):
            children = _children()
            below = list(children[os.getpid()])
            driver_mib = sum(map(_resident_mib, below))
            for pid in below:
                below.extend(children[pid])
            # A worker that has done its last slice loses its title, but what it took stays its own.
            workers |= {pid for pid in below if _WORKER_TITLE in _title(pid)}
            others = [os.getpid(), *(pid for pid in below if pid not in workers)]
            self.samples.append(
                Sample(time.time(), driver_mib, sum(map(_resident_mib, workers)), sum(map(_cpu_s, others)))
            )


def memory_growth(samples: Sequence[Sample], records: Sequence[SliceRecord]) -> float | None:
    """Peak memory of the workers in the last third of a run over that in the middle one; None for too few samples."""
    first_unix_s, last_unix_s = _under_way(records)
    third_s = (last_unix_s - first_unix_s) / 3
    middle = [one.workers_mib for one in _within(samples, first_unix_s + third_s, last_unix_s - third_s)]
    last = [one.workers_mib for one in _within(samples, last_unix_s - third_s, last_unix_s)]
    return max(last) / max(middle) if middle and last and max(middle) else None


def share_of_others(samples: Sequence[Sample], records: Sequence[SliceRecord]) -> float | None:
    """The share of all cores that driver and Ray took while slices were under way; None for too few samples."""
    within = _within(samples, *_under_way(records))
    if len(within) < 2:
        return None
    seconds = within[-1].at_unix_s - within[0].at_unix_s
    return (within[-1].others_cpu_s - within[0].others_cpu_s) / (seconds * (os.cpu_count() or 1))


def _under_way(records: Sequence[SliceRecord]) -> tuple[float, float]:
    """From the first batch through a network to the end of the last slice, in seconds since 1970."""
    return min(one.first_row_unix_s for one in records), max(one.finished_unix_s for one in records)


def _within(samples: Sequence[Sample], first_unix_s: float, last_unix_s: float) -> list[Sample]:
    return [one for one in samples if first_unix_s <= one.at_unix_s <= last_unix_s]


def _children() -> dict[int, list[int]]:
    """The children of every process."""
    found: dict[int, list[int]] = defaultdict(list)
    for name in os.listdir("/proc"):
        if name.isdigit():
            # A process may end while it is looked at.
            with suppress(OSError):
                found[int(_stat(int(name))[1])].append(int(name))
    return found


def _cpu_s(pid: int) -> float:
    with suppress(OSError):
        return sum(map(int, _stat(pid)[11:13])) / _TICKS_A_SECOND
    return 0.0


def _stat(pid: int) -> list[str]:
    """What Linux says of a process behind its name, which may hold anything."""
    return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()


def _resident_mib(pid: int) -> float:
    with suppress(OSError):
        return int(Path("/proc", str(pid), "statm").read_text().split()[1]) * _PAGE_MIB
    return 0.0


def _title(pid: int) -> str:
    with suppress(OSError):
        return Path("/proc", str(pid), "cmdline").read_text(errors="replace")
    return ""
