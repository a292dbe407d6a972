"""The facts of a machine that explain its rates."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from convoy.vision.engine_options import best_precision

_PACKAGES = ("torch", "torchvision", "ray", "pyarrow", "Pillow", "numpy")
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def machine_facts() -> dict[str, Any]:
    """Cores, processor and its flags, memory, load, and versions; what cannot be found out is left out."""
    cpuinfo = _cpuinfo()
    flags = cpuinfo.get("flags", "").split()
    return {
        "cores": os.cpu_count(),
        "cpu": cpuinfo.get("model name", platform.machine()),
        "cpu_flags": [flag for flag in _FLAGS if flag in flags],
        "auto_precision": best_precision().value,
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average_1min": os.getloadavg()[0],
        "kernel": platform.release(),
        "python": platform.python_version(),
        **{package.lower(): version(package) for package in _PACKAGES},
    }


def describe_machine(facts: dict[str, Any]) -> Iterator[str]:
    """The facts as a list in Markdown."""
    for name, fact in facts.items():
        yield f"- {name}: {', '.join(fact) if isinstance(fact, list) else fact}"


def _cpuinfo() -> dict[str, str]:
    """The fields of the first processor, as Linux describes it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in lines}
