"""The facts of a machine that explain its rates."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import torch

from convoy.vision.engine_options import device_here, facts_here

_PACKAGES = ("torch", "torchvision", "ray", "pyarrow", "Pillow", "numpy")


def machine_facts() -> dict[str, Any]:
    """Cores, processor and its flags, memory, load, and versions; what cannot be found out is left out."""
    facts = facts_here()
    return {
        "cores": os.cpu_count(),
        "cpu": facts.cpu,
        "cpu_flags": list(facts.cpu_flags),
        **({} if facts.gpu is None else {"gpu": facts.gpu}),
        "auto_precision": device_here().precision.value,
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average_1min": os.getloadavg()[0],
        "kernel": platform.release(),
        "python": platform.python_version(),
        **{package.lower(): version(package) for package in _PACKAGES},
    }


def by_device(cpu: int, gpu: int) -> int:
    """A size that is another one where there is a GPU."""
    return gpu if torch.cuda.is_available() else cpu


def describe_machine(facts: dict[str, Any]) -> Iterator[str]:
    """The facts as a list in Markdown."""
    for name, fact in facts.items():
        yield f"- {name}: {', '.join(fact) if isinstance(fact, list) else fact}"
