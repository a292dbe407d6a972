"""How fast a network runs here: images a second in batches, the latency of one image, and its memory."""

from __future__ import annotations

import gc
import time

import numpy as np
import torch
from torch import Tensor

from convoy.core.config import StrictModel
from convoy.core.machine import peak_memory_bytes, reset_peak_memory, resident_memory_bytes
from convoy.vision.engine import FeatureEngine
from convoy.vision.forward import casting_once

_WARM_UP_PASSES = 2
_FEWEST_PASSES = 5


class NetworkTiming(StrictModel):
    """One network on one device.

    `images_per_s` is that of the median batch; `slow_images_per_s` and `fast_images_per_s` those of the batches at
    the 90th and the 10th percentile of time. Latencies are of one image, from pixels in memory to an answer there.
    """

    images_per_s: float
    slow_images_per_s: float
    fast_images_per_s: float
    latency_p50_ms: float
    latency_p95_ms: float


class MemoryMeter:
    """The most memory since its making, above what was in use then: of the GPU, or else of this process."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before: int | None = torch.cuda.memory_allocated(device)
        else:
            reset_peak_memory()
            self._before = resident_memory_bytes()

    def peak_bytes(self) -> int | None:
        """The bytes, or None where the system does not say."""
        on_gpu = self._device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self._device) if on_gpu else peak_memory_bytes()
        return None if peak is None or self._before is None else max(peak - self._before, 0)


def time_network(engine: FeatureEngine, *, seconds: float, num_latencies: int) -> NetworkTiming:
    """Time an engine on images of noise: batches for so many seconds, then single images for as long at most.

    At least five passes of each are timed, whatever they take; two more before them warm up.
    """
    images_BCHW = engine.new_batch()
    noise = torch.Generator().manual_seed(0)
    images_BCHW.copy_(torch.randint(0, 256, images_BCHW.shape, dtype=torch.uint8, generator=noise))
    batches_s = _pass_seconds(engine, images_BCHW, seconds=seconds, most=None)
    singles_s = _pass_seconds(engine, images_BCHW[:1], seconds=seconds, most=num_latencies)
    fast_s, median_s, slow_s = np.quantile(batches_s, [0.1, 0.5, 0.9]).tolist()
    p50_s, p95_s = np.quantile(singles_s, [0.5, 0.95]).tolist()
    batch_size = len(images_BCHW)
    return NetworkTiming(
        images_per_s=batch_size / median_s,
        slow_images_per_s=batch_size / slow_s,
        fast_images_per_s=batch_size / fast_s,
        latency_p50_ms=1000 * p50_s,
        latency_p95_ms=1000 * p95_s,
    )


def _pass_seconds(
    engine: FeatureEngine, images_BCHW: Tensor, *, seconds: float, most: int | None
) -> list[float]:
    with casting_once(engine.device):
        for _ in range(_WARM_UP_PASSES):
            _run(engine, images_BCHW)
        durations_s: list[float] = []
        end_s = time.perf_counter() + seconds
        while len(durations_s) < _FEWEST_PASSES or (
            time.perf_counter() < end_s and (most is None or len(durations_s) < most)
        ):
            started_s = time.perf_counter()
            _run(engine, images_BCHW)
            durations_s.append(time.perf_counter() - started_s)
        return durations_s


def _run(engine: FeatureEngine, images_BCHW: Tensor) -> None:
    """A pass to its end: to bring the features to the host waits for the device."""
    for features_BD in engine.run(images_BCHW).values():
        features_BD.cpu()
