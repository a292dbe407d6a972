"""Processes: what tells one from all others, whether one on this machine has ended, and how this one uses memory."""

from __future__ import annotations

import ctypes
import os
import socket
from pathlib import Path

from convoy.core.config import StrictModel

# Parameters of glibc's `mallopt`, from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_MOST_KEPT_BYTES = 1 << 30
# The most that an older glibc takes: half of what one pool of a thread may hold.
_OLD_MMAP_THRESHOLD_BYTES = 32 << 20
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class ProcessIdentity(StrictModel):
    """A process on some machine.

    `place` names the boot of the machine and the space of its process ids, `started` the time of the process's
    start in ticks since the boot: a later process with the same id has another. Both are empty where the system
    does not say.
    """

    host: str
    place: str
    pid: int
    started: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def this_process() -> ProcessIdentity:
    """The process that asks."""
    pid = os.getpid()
    return ProcessIdentity(host=socket.gethostname(), place=_place(), pid=pid, started=_started(pid))


def has_ended(process: ProcessIdentity) -> bool:
    """Whether it is certain that a process has ended; False where this machine cannot tell, as of one elsewhere."""
    if not process.place or (process.host, process.place) != (socket.gethostname(), _place()):
        return False
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return _started(process.pid) != process.started


def keep_freed_memory() -> None:
    """Keep up to 1 GiB of what is freed for what is allocated next. For processes that run networks on CPUs.

    The activations of a layer take tens of MB. glibc gives them back at once, and the kernel clears every page that it
    hands out again: a sixth of the time of a ResNet. Threads that have not allocated yet share one pool of memory, as
    the others hold blocks of 64 MB at most; a process that has more than eight pools by now, as Ray's workers do, needs
    MALLOC_ARENA_MAX=1 from its start for that. Without glibc nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    # Without this one, the next would fix the bound to what comes from the kernel anew at its start, 128 kB.
    if not mallopt(_M_MMAP_THRESHOLD, _MOST_KEPT_BYTES):
        mallopt(_M_MMAP_THRESHOLD, _OLD_MMAP_THRESHOLD_BYTES)
    mallopt(_M_TRIM_THRESHOLD, _MOST_KEPT_BYTES)
    mallopt(_M_ARENA_MAX, 1)


def _place() -> str:
    try:
        # Containers on one machine share the boot, but not the process ids.
        return f"{_BOOT_ID.read_text(encoding='utf-8').strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """The start of a process in ticks since the boot; empty if it ended, though its parent did not look yet."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    # The second field, the name in parentheses, may hold anything; the third is the state, the 22nd the start.
    fields = status.rpartition(")")[2].split()
    return "" if fields[0] in {"Z", "X"} else fields[19]
