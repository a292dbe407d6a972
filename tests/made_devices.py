"""Devices that networks run on, without the machines."""

from __future__ import annotations

from convoy.vision.engine_options import NetworkDevice, Precision


def made_device(
    precision: Precision = Precision.BF16,
    *,
    name: str = "NVIDIA H100",
    is_gpu: bool = True,
    has_compiler: bool | None = True,
    num_cpus: int = 2,
) -> NetworkDevice:
    """A GPU that has bf16, with a compiler beside it, unless it is said otherwise."""
    return NetworkDevice(
        name=name, is_gpu=is_gpu, precision=precision, has_compiler=has_compiler, num_cpus=num_cpus
    )
