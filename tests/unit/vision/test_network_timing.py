from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch import Tensor, nn

from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.backbones import build_network, depth_axis
from convoy.vision.engine import FeatureEngine
from convoy.vision.engine_options import EngineOptions, Precision
from convoy.vision.network_timing import time_network
from convoy.vision.presets import EvalPreset

PRESET = EvalPreset(resize_px=32, crop_px=32)
LENET = BackboneConfig(arch="lenet5", weights="random", preset=PRESET)
MIB = 2**20


class Slow(nn.Module):
    """A module that takes some milliseconds for every image beside what it is made for."""

    def __init__(self, inner: nn.Module, milliseconds: float) -> None:
        super().__init__()
        self._inner, self._seconds = inner, milliseconds / 1000

    def forward(self, images_BCHW: Tensor) -> Tensor:
        time.sleep(self._seconds * len(images_BCHW))
        maps_BCHW: Tensor = self._inner(images_BCHW)
        return maps_BCHW


def engine(*, milliseconds: float, batch_size: int) -> FeatureEngine:
    network = build_network(LENET)
    axis = depth_axis(LENET, network)
    name = axis[0].module_names[0]
    parent = network.get_submodule(name.rpartition(".")[0])
    setattr(parent, name.rpartition(".")[2], Slow(network.get_submodule(name), milliseconds))
    options = EngineOptions(precision=Precision.FP32, batch_size=batch_size, compiled=False, num_threads=1)
    return FeatureEngine(network, axis, PRESET, taps=("logits",), options=options)


def test_rates_and_latencies_are_those_of_the_network() -> None:
    """At five milliseconds an image, a batch is no faster than its images, however idle the machine."""
    timing = time_network(engine(milliseconds=5, batch_size=4), seconds=0.3, num_latencies=20)
    assert timing.slow_images_per_s <= timing.images_per_s <= timing.fast_images_per_s <= 200
    assert timing.slow_images_per_s > 0
    assert 5 <= timing.latency_p50_ms <= timing.latency_p95_ms


def test_at_least_five_passes_are_timed_however_slow() -> None:
    started_s = time.perf_counter()
    timing = time_network(engine(milliseconds=20, batch_size=2), seconds=0.001, num_latencies=1)
    # Two to warm up and five that count, of a batch and of an image.
    assert time.perf_counter() - started_s >= 7 * 0.06
    assert 0 < timing.images_per_s <= 50


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux' account of memory")
def test_memory_is_the_most_above_what_was_in_use_before() -> None:
    """In a process of its own, as networks are measured: one that has run long takes memory that it holds already."""
    script = """if True:
        import torch
        from convoy.vision.network_timing import MemoryMeter

        held = torch.ones(50 << 20, dtype=torch.uint8)
        meter = MemoryMeter(torch.device("cpu"))
        passing = torch.ones(100 << 20, dtype=torch.uint8)
        del passing
        print(meter.peak_bytes(), len(held))
    """
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    peak_bytes, _ = map(int, finished.stdout.split())
    assert 90 * MIB < peak_bytes < 140 * MIB
