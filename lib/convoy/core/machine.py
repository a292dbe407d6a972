"""What of a machine explains its rates, and the memory of this process, as Linux tells it."""

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
    return _status_bytes("VmRSS")


def peak_memory_bytes() -> int | None:
    """The highest resident memory of this process since its start, or since `reset_peak_memory`."""
    return _status_bytes("VmHWM")


def _status_bytes(name: str) -> int | None:
    try:
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    found = next((line for line in lines if line.startswith(f"{name}:")), None)
    return None if found is None else int(found.split()[1]) * 1024


def _num_cpus() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1
