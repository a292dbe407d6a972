"""How a network is run, as values, and what this machine is good for. Free of torch."""

from __future__ import annotations

import os
import platform
import shutil
import sysconfig
from enum import StrEnum
from pathlib import Path

from convoy.core.config import StrictModel
from convoy.core.machine import MachineFacts, machine_facts, read_cpuinfo

# Of its GPUs a container may see any one, but this always; Linux within Windows has the second instead.
_GPU_DEVICES = (Path("/dev/nvidiactl"), Path("/dev/dxg"))
_GPU_COMPILERS = ("gcc", "clang")
_CPU_COMPILERS = ("g++", "clang++")
# Images of 224 pixels in a batch, and how many there are at most of smaller ones. On CPUs more of them fall out of the
# caches; GPUs without native bf16 are the ones with little memory.
_CPU_BATCH, _MOST_IN_A_CPU_BATCH = 32, 128
_GPU_BATCH, _OLD_GPU_BATCH = 256, 64
_BATCH_PX = 224
# Of networks at 224 pixels, eagerly, by published rates of ResNet-50: about 1e13 and 2e12 multiply-adds a second, where
# two CPU cores with bf16 have 2.5e11.
_GPU_SPEED, _OLD_GPU_SPEED = 40.0, 8.0


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


class NetworkDevice(StrictModel):
    """What runs networks on a machine, its GPU or else its CPU, and what that is good for.

    `precision` is what it computes fastest. `has_compiler` tells whether `torch.compile` can work there; None where
    that is not known. `num_cpus` are those of the machine.
    """

    name: str
    is_gpu: bool
    precision: Precision
    has_compiler: bool | None
    num_cpus: int = 2

    @property
    def speed(self) -> float:
        """How many times as fast as two CPU cores it is, to within a factor of three."""
        if not self.is_gpu:
            return max(self.num_cpus / 2, 1.0)
        return _GPU_SPEED if self.precision is Precision.BF16 else _OLD_GPU_SPEED

    def batch_size(self, crop_px: int) -> int:
        """Images of `crop_px` a pass where nobody says otherwise: a power of two; the larger they are, the fewer."""
        at_224, most = _CPU_BATCH, _MOST_IN_A_CPU_BATCH
        if self.is_gpu:
            at_224 = most = _GPU_BATCH if self.precision is Precision.BF16 else _OLD_GPU_BATCH
        fitting = min(at_224 * _BATCH_PX**2 // crop_px**2, most)
        return 1 << max(fitting.bit_length() - 1, 0)

    @property
    def precision_note(self) -> str:
        """The precision and why, for people."""
        has = "computes bf16 natively" if self.precision is Precision.BF16 else "has no native bf16"
        return f"precision {self.precision.value}: {self.name} {has}"

    @property
    def compilers(self) -> str:
        """What `torch.compile` needs for it: its CPU code is C++, and kernels of a GPU are launched from C."""
        named = " or ".join(_GPU_COMPILERS if self.is_gpu else _CPU_COMPILERS)
        return f"{named} with Python's headers (python3-dev)"


def device_here() -> NetworkDevice:
    """That of this machine. Emulated bf16 is slower than fp32, so it does not count."""
    if _may_have_gpu():
        import torch  # noqa: PLC0415 (a driver without a GPU need not wait for it)

        if torch.cuda.is_available():
            is_native = torch.cuda.is_bf16_supported(including_emulation=False)
            return _device(torch.cuda.get_device_name(), is_gpu=True, has_bf16=is_native)
    cpuinfo = read_cpuinfo()
    has_bf16 = not {"avx512_bf16", "amx_bf16"}.isdisjoint(cpuinfo.get("flags", "").split())
    return _device(cpuinfo.get("model name", platform.machine()), is_gpu=False, has_bf16=has_bf16)


def has_python_headers() -> bool:
    """Whether what torch.compile writes can be compiled here: it includes Python.h, which comes in a package apart."""
    return Path(sysconfig.get_path("include"), "Python.h").is_file()


def _device(name: str, *, is_gpu: bool, has_bf16: bool) -> NetworkDevice:
    compilers = _GPU_COMPILERS if is_gpu else _CPU_COMPILERS
    return NetworkDevice(
        name=name,
        is_gpu=is_gpu,
        precision=Precision.BF16 if has_bf16 else Precision.FP32,
        has_compiler=any(map(shutil.which, compilers)) and has_python_headers(),
        num_cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
    )


def facts_here() -> MachineFacts:
    """What explains the rates of networks on this machine, its current GPU included."""
    if not _may_have_gpu():
        return machine_facts(None)
    import torch  # noqa: PLC0415 (as above)

    return machine_facts(torch.cuda.get_device_name() if torch.cuda.is_available() else None)


def _may_have_gpu() -> bool:
    return any(device.exists() for device in _GPU_DEVICES)
