"""What the machine can do at most: each stage of the job alone, over the same images, with all cores busy."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Barrier

import numpy as np
import torch
from measuring import list_images
from pydantic import Field
from score_network import ScoredNetwork
from torch import Tensor

from convoy.core.config import StrictModel, load_config
from convoy.storage.object_store import ObjectStore
from convoy.storage.parts import FeatureRows, write_features
from convoy.storage.stores import open_store
from convoy.vision.augmentation_policy import EVAL_VIEW
from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.backbones import build_network, default_preset
from convoy.vision.decode_rule import DecodeRule
from convoy.vision.decoding import decode_image
from convoy.vision.depth_axis import derive_depth_axis
from convoy.vision.engine import FeatureEngine
from convoy.vision.engine_options import EngineOptions, Precision
from convoy.vision.presets import EvalPreset
from convoy.vision.stages import resolve_tap
from convoy.vision.views import prepare_view

_BACKBONE = BackboneConfig(arch="torchvision:resnet18", weights="random")
_MAX_IMAGES = 256
_NUM_FEATURES = 512


class BoundsSettings(StrictModel):
    """Which images, and for how long each stage is measured after its warm-up; null is ResNet-18 up to its pooling."""

    images: str
    batch_size: int = Field(default=32, gt=0)
    probe_s: float = Field(default=4.0, gt=0)
    compiled: bool = False
    network: ScoredNetwork | None = None


class Bounds(StrictModel):
    """Images per second of each stage alone.

    `get`: bytes of files in the page cache. `decode`: `decode_image`. `prepare`: that and `prepare_view`. `write`:
    `write_features` of 512 float16 values a row. `forward_*`: the engine over one batch that is ready, eager in
    bf16 and float32 and, where asked for, compiled in bf16; of one process with all cores and, without a GPU, of a
    process for each core, whichever is faster.
    """

    get: float
    decode: float
    prepare: float
    write: float
    forward_bf16: float
    forward_fp32: float
    forward_compiled: float | None = None

    def forward(self, precision: Precision) -> float:
        """The rate of the network as the job ran it."""
        return self.forward_bf16 if precision is Precision.BF16 else self.forward_fp32

    def combined(self, precision: Precision) -> float:
        """The rate when all stages share the cores: the seconds that each costs an image add up."""
        stages = (self.get, self.prepare, self.forward(precision), self.write)
        return 1 / sum(1 / rate for rate in stages)


class _Stages:
    """One round of each stage but the network, over some images in memory; a thread a core."""

    def __init__(self, paths: list[str], preset: EvalPreset, store: ObjectStore, num_threads: int) -> None:
        self._paths = paths
        self._encoded = [Path(path).read_bytes() for path in paths]
        self._preset = preset
        self.images_BCHW = _empty_batch(len(paths), preset)
        self._store = store
        self._shares = [range(thread, len(paths), num_threads) for thread in range(num_threads)]
        self._threads = ThreadPoolExecutor(num_threads)

    def get(self) -> int:
        return self._share_out(lambda index: Path(self._paths[index]).read_bytes())

    def decode(self) -> int:
        return self._share_out(lambda index: decode_image(self._encoded[index], DecodeRule()))

    def prepare(self) -> int:
        return self._share_out(self._prepare)

    def write(self) -> int:
        return self._over_threads(self._write)

    def _share_out(self, work: Callable[[int], object]) -> int:
        return self._over_threads(lambda share: [work(index) for index in share])

    def _over_threads(self, work: Callable[[range], object]) -> int:
        for _ in self._threads.map(work, self._shares):
            pass
        return len(self._paths)

    def _prepare(self, index: int) -> None:
        decoded = decode_image(self._encoded[index], DecodeRule())
        out_CHW = self.images_BCHW[index]
        prepare_view(decoded.pixels_CHW, self._preset, out_CHW, view=EVAL_VIEW, policy=None, content_id=b"")

    def _write(self, share: range) -> None:
        rows = FeatureRows(
            sample_ids=[self._paths[index] for index in share],
            content_ids=[bytes(16)] * len(share),
            content_digests=[bytes(16)] * len(share),
            view=EVAL_VIEW,
            features_BD=np.random.default_rng(0).random((len(share), _NUM_FEATURES)).astype(np.float16),
        )
        write_features(self._store, f"part-{share.start}.parquet", rows, {})


def measure_bounds(settings: BoundsSettings) -> Bounds:
    """All rates. Takes about ten times `probe_s`, the time to compile, and that to start a process for each core."""
    num_cores = os.cpu_count() or 1
    backbone = _BACKBONE if settings.network is None else settings.network.backbone
    preset = default_preset(backbone)
    # Threads that prepare images share the cores already.
    torch.set_num_threads(1)
    with TemporaryDirectory(prefix="convoy-bench-bounds-") as folder:
        paths = list_images(settings.images)[:_MAX_IMAGES]
        stages = _Stages(paths, preset, open_store(folder), num_cores)
        rounds = {
            "get": stages.get,
            "decode": stages.decode,
            "prepare": stages.prepare,
            "write": stages.write,
        }
        rates = {name: _rate(run_round, settings.probe_s) for name, run_round in rounds.items()}
    batch_BCHW = _empty_batch(settings.batch_size, preset)
    batch_BCHW.copy_(stages.images_BCHW[torch.arange(settings.batch_size) % len(paths)])
    for name, options in _engines(settings, num_cores):
        engine = _engine_of(settings, options)
        rates[name] = _rate(lambda run=engine.run: _forward(run, batch_BCHW), settings.probe_s)
        if num_cores > 1 and not (options.compiled or torch.cuda.is_available()):
            alone = options.model_copy(update={"num_threads": 1})
            rates[name] = max(rates[name], _rate_of_processes(settings, alone, batch_BCHW, num_cores))
    return Bounds(**rates)


def _rate_of_processes(
    settings: BoundsSettings, options: EngineOptions, batch_BCHW: Tensor, num_processes: int
) -> float:
    """Images per second of networks in so many processes at once."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(num_processes, mp_context=context) as processes:
        start = manager.Barrier(num_processes)
        rates = [
            processes.submit(_rate_at_once, settings, options, batch_BCHW.numpy(), start)
            for _ in range(num_processes)
        ]
        return sum(rate.result() for rate in rates)


def _rate_at_once(
    settings: BoundsSettings, options: EngineOptions, images_BCHW: np.ndarray, start: Barrier
) -> float:
    """What one of the processes does: it begins when all of them are ready."""
    engine, batch_BCHW = _engine_of(settings, options), torch.from_numpy(images_BCHW)
    _forward(engine.run, batch_BCHW)
    start.wait()
    return _rate(lambda: _forward(engine.run, batch_BCHW), settings.probe_s)


def _engines(settings: BoundsSettings, num_threads: int) -> Iterator[tuple[str, EngineOptions]]:
    for precision, compiled in (
        (Precision.BF16, False),
        (Precision.FP32, False),
        *([(Precision.BF16, True)] if settings.compiled else []),
    ):
        name = "forward_compiled" if compiled else f"forward_{precision}"
        yield (
            name,
            EngineOptions(
                precision=precision,
                batch_size=settings.batch_size,
                compiled=compiled,
                num_threads=num_threads,
            ),
        )


def _engine_of(settings: BoundsSettings, options: EngineOptions) -> FeatureEngine:
    backbone, tap = (
        (_BACKBONE, "pooled") if settings.network is None else (settings.network.backbone, "logits")
    )
    network, preset = build_network(backbone), default_preset(backbone)
    axis = derive_depth_axis(network, input_px=preset.crop_px)
    return FeatureEngine(network, axis, preset, taps=[resolve_tap(axis, tap).name], options=options)


def _forward(run: Callable[[Tensor], dict[str, Tensor]], batch_BCHW: Tensor) -> int:
    (features_BD,) = run(batch_BCHW).values()
    return len(features_BD.cpu())


def _rate(run_round: Callable[[], int], probe_s: float) -> float:
    """Images per second of whole rounds, for `probe_s` seconds or a little longer."""
    for _ in range(3):
        run_round()
    num_images, started_s = 0, time.perf_counter()
    while (elapsed_s := time.perf_counter() - started_s) < probe_s:
        num_images += run_round()
    return num_images / elapsed_s


def _empty_batch(num_images: int, preset: EvalPreset) -> Tensor:
    shape = (num_images, 3, preset.crop_px, preset.crop_px)
    return torch.zeros(shape, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)


if __name__ == "__main__":
    print(measure_bounds(load_config(BoundsSettings, None, sys.argv[1:])).model_dump_json())
