"""What of a machine explains its rates, and the memory of this process, used and free, as Linux tells it."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

from convoy.core.config import StrictModel

_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
_CPUINFO = Path("/proc/cpuinfo")
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


class MachineFacts(StrictModel):
    """Two places with equal facts run a network alike: processor, its wide instructions, CPUs, GPU, PyTorch."""

    cpu: str
    cpu_flags: tuple[str, ...]
    num_cpus: int
    gpu: str | None
    torch: str


def machine_facts(gpu: str | None) -> MachineFacts:
    """The facts of this machine; the name of its GPU, which only CUDA knows, is given."""
    cpuinfo = read_cpuinfo()
    flags = cpuinfo.get("flags", "").split()
    return MachineFacts(
        cpu=cpuinfo.get("model name", platform.machine()),
        cpu_flags=tuple(flag for flag in _FLAGS if flag in flags),
        num_cpus=_num_cpus(),
        gpu=gpu,
        torch=version("torch"),
    )


def read_cpuinfo() -> dict[str, str]:
    """The fields of the first processor, as Linux describes it; empty elsewhere."""
    try:
        text = _CPUINFO.read_text(encoding="ascii", errors="replace")
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in lines}


def reset_peak_memory() -> None:
    """Let the highest resident memory of this process be the current one, where Linux lets us."""
    try:
        _CLEAR_REFS.write_text("5", encoding="ascii")
    except OSError:
        return


def resident_memory_bytes() -> int | None:
    """The resident memory of this process; None where the system does not say."""
    return _kib_field(_STATUS, "VmRSS")


def peak_memory_bytes() -> int | None:
    """The highest resident memory of this process since its start, or since `reset_peak_memory`."""
    return _kib_field(_STATUS, "VmHWM")


def free_memory_bytes() -> int | None:
    """What processes can still take, of the machine and of this container; None where the system does not say."""
    of_machine = _kib_field(_MEMINFO, "MemAvailable")
    if of_machine is None:
        return None
    try:
        limit, used = ((_CGROUP / name).read_text() for name in ("memory.max", "memory.current"))
        fields = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        # Without a limit that is the word max. Pages of files that nobody looks at are given back.
        of_container = int(limit) - int(used) + int(fields["inactive_file"])
    except (OSError, ValueError, KeyError):
        return of_machine
    return max(min(of_machine, of_container), 0)


def _kib_field(path: Path, name: str) -> int | None:
    """The bytes of a field that stands in a file of Linux in KiB."""
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    found = next((line for line in lines if line.startswith(f"{name}:")), None)
    return None if found is None else int(found.split()[1]) * 1024


def _num_cpus() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1
