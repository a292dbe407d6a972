"""What a machine runs networks on: bf16 only where that has it natively, and compilers that fit it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from convoy.vision import engine_options
from convoy.vision.engine_options import Precision, device_here


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A machine with a GPU in it, and a CPU without bf16."""
    monkeypatch.setattr(engine_options, "_GPU_DEVICES", (tmp_path,))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(engine_options, "read_cpuinfo", lambda: {"flags": "avx2"})
    return monkeypatch


def has_capability(patch: pytest.MonkeyPatch, major: int) -> None:
    """A GPU of that compute capability; like all, it emulates what it lacks."""

    def is_supported(including_emulation: bool = True) -> bool:
        return major >= 8 or including_emulation

    patch.setattr(torch.cuda, "is_bf16_supported", is_supported)


@pytest.mark.parametrize(
    ("major", "expected"), [(9, Precision.BF16), (8, Precision.BF16), (7, Precision.FP32)]
)
def test_a_gpu_gets_bf16_if_it_computes_it_itself(
    gpu: pytest.MonkeyPatch, major: int, expected: Precision
) -> None:
    has_capability(gpu, major)
    assert device_here().precision is expected


@pytest.mark.parametrize(
    ("flags", "expected"), [("avx2 avx512_bf16", Precision.BF16), ("avx2", Precision.FP32)]
)
def test_a_gpu_that_torch_cannot_use_leaves_the_choice_to_the_cpu(
    gpu: pytest.MonkeyPatch, flags: str, expected: Precision
) -> None:
    gpu.setattr(torch.cuda, "is_available", lambda: False)
    gpu.setattr(engine_options, "read_cpuinfo", lambda: {"flags": flags})
    assert device_here().precision is expected


@pytest.mark.parametrize(
    ("installed", "is_gpu", "expected"),
    [
        # Kernels of a GPU are launched from C, the code for a CPU is C++.
        ({"gcc"}, True, True),
        ({"clang"}, True, True),
        ({"gcc"}, False, False),
        ({"g++"}, False, True),
        ({"clang++"}, False, True),
        (set(), True, False),
    ],
)
def test_a_compiler_is_one_for_what_runs_the_networks(
    gpu: pytest.MonkeyPatch, installed: set[str], is_gpu: bool, expected: bool
) -> None:
    has_capability(gpu, 9)
    gpu.setattr(torch.cuda, "is_available", lambda: is_gpu)
    gpu.setattr(engine_options.shutil, "which", lambda name: name if name in installed else None)
    device = device_here()
    assert (device.is_gpu, device.has_compiler) == (is_gpu, expected)


def test_a_compiler_is_none_without_the_headers_of_python(gpu: pytest.MonkeyPatch, tmp_path: Path) -> None:
    has_capability(gpu, 9)
    gpu.setattr(engine_options.shutil, "which", lambda name: name)
    gpu.setattr(engine_options.sysconfig, "get_path", lambda _: str(tmp_path))
    assert not device_here().has_compiler
    (tmp_path / "Python.h").touch()
    assert device_here().has_compiler


def test_a_precision_is_told_with_its_reason(gpu: pytest.MonkeyPatch) -> None:
    has_capability(gpu, 9)
    assert device_here().precision_note == "precision bf16: NVIDIA H100 computes bf16 natively"
    has_capability(gpu, 7)
    assert device_here().precision_note == "precision fp32: NVIDIA H100 has no native bf16"
