"""How a network is run, as values, and what this machine is good for. Free of torch."""

from __future__ import annotations

import shutil
from enum import StrEnum
from pathlib import Path

from convoy.core.config import StrictModel
from convoy.core.machine import MachineFacts, machine_facts, read_cpuinfo

_GPU = Path("/dev/nvidia0")


class Precision(StrEnum):
    """What the network computes in. Features are returned in float32 either way."""

    FP32 = "fp32"
    BF16 = "bf16"


class EngineOptions(StrictModel):
    """How a network is run. `batch_size` is fixed: short batches are padded by the caller."""

    precision: Precision
    batch_size: int
    compiled: bool
    num_threads: int


def best_precision() -> Precision:
    """bf16 where this machine's GPU, or else its CPU, computes it natively; emulated bf16 is slower than fp32."""
    if _GPU.exists():
        import torch  # noqa: PLC0415 (a driver without a GPU need not wait for it)

        if torch.cuda.is_available():
            is_native = torch.cuda.is_bf16_supported(including_emulation=False)
            return Precision.BF16 if is_native else Precision.FP32
    flags = read_cpuinfo().get("flags", "").split()
    return Precision.BF16 if "avx512_bf16" in flags or "amx_bf16" in flags else Precision.FP32


def facts_here() -> MachineFacts:
    """What explains the rates of networks on this machine, its current GPU included."""
    if not _GPU.exists():
        return machine_facts(None)
    import torch  # noqa: PLC0415 (as above)

    return machine_facts(torch.cuda.get_device_name() if torch.cuda.is_available() else None)


def has_compiler() -> bool:
    """Whether `torch.compile` can work here: its CPU code needs a C++ compiler."""
    return shutil.which("g++") is not None or shutil.which("clang++") is not None
