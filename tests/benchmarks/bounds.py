"""What the machine can do at most: each stage of the job alone, over the same images, all cores busy."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from enum import StrEnum
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from every_core import EveryCore, Round
from measuring import list_images
from pydantic import Field
from score_network import ScoredNetwork
from torch import Tensor

from convoy.core.config import StrictModel, load_config
from convoy.core.processes import keep_freed_memory
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
from convoy.vision.folding import fold_batch_norms
from convoy.vision.forward import new_images
from convoy.vision.presets import EvalPreset
from convoy.vision.stages import resolve_tap
from convoy.vision.views import prepare_view

_BACKBONE = BackboneConfig(arch="torchvision:resnet18", weights="random")
_MAX_IMAGES = 256
_NUM_FEATURES = 512
# So that a GPU is not waited for after each.
_BATCHES_A_ROUND = 4


class BoundsSettings(StrictModel):
    """Which images, and for how long each stage is measured after its warm-up; null is ResNet-18 up to its pooling."""

    images: str
    batch_size: int = Field(default=32, gt=0)
    probe_s: float = Field(default=4.0, gt=0)
    compiled: bool = False
    network: ScoredNetwork | None = None


class Bounds(StrictModel):
    """Images per second of each stage alone.

    Of a process for each core: `get`, bytes of files in the page cache; `decode`, `decode_image`; `prepare`, that
    and `prepare_view`; `write`, `write_features` of 512 float16 values a row. `forward_*`: the engine over one
    batch that is ready, eager in bf16 and float32 and, where asked for, compiled in bf16; of one process with all
    cores and, without a GPU, of a process for each core, whichever is faster. `device`: where that was.
    """

    get: float
    decode: float
    prepare: float
    write: float
    forward_bf16: float
    forward_fp32: float
    forward_compiled: float | None = None
    device: str

    def forward(self, precision: Precision) -> float:
        """The rate of the network as the job ran it."""
        return self.forward_bf16 if precision is Precision.BF16 else self.forward_fp32

    def combined(self, precision: Precision) -> float:
        """The rate when all stages share the cores, where the seconds that each costs an image add up.

        A GPU computes beside them: then it is the slower of the network and of the other stages together.
        """
        beside = 1 / sum(1 / rate for rate in (self.get, self.prepare, self.write))
        forward = self.forward(precision)
        return min(forward, beside) if self.device == "cuda" else 1 / (1 / forward + 1 / beside)


class _Stage(StrEnum):
    GET = "get"
    DECODE = "decode"
    PREPARE = "prepare"
    WRITE = "write"


class _Stages:
    """One round of each stage but the network, over some images in memory."""

    def __init__(self, paths: list[str], preset: EvalPreset, folder: str) -> None:
        self._paths = paths
        self._encoded = [Path(path).read_bytes() for path in paths]
        self._preset = preset
        self.images_BCHW = new_images((len(paths), 3, preset.crop_px, preset.crop_px), torch.device("cpu"))
        self._store = open_store(folder)
        self._name = f"part-{os.getpid()}.parquet"

    def get(self) -> int:
        return self._each(lambda index: Path(self._paths[index]).read_bytes())

    def decode(self) -> int:
        return self._each(lambda index: decode_image(self._encoded[index], DecodeRule()))

    def prepare(self) -> int:
        return self._each(self._prepare)

    def write(self) -> int:
        num_rows = len(self._paths)
        rows = FeatureRows(
            sample_ids=self._paths,
            content_ids=[bytes(16)] * num_rows,
            content_digests=[bytes(16)] * num_rows,
            view=EVAL_VIEW,
            features_BD=np.random.default_rng(0).random((num_rows, _NUM_FEATURES)).astype(np.float16),
        )
        write_features(self._store, self._name, rows, {})
        return num_rows

    def _each(self, work: Callable[[int], object]) -> int:
        for index in range(len(self._paths)):
            work(index)
        return len(self._paths)

    def _prepare(self, index: int) -> None:
        decoded = decode_image(self._encoded[index], DecodeRule())
        out_CHW = self.images_BCHW[index]
        prepare_view(decoded.pixels_CHW, self._preset, out_CHW, view=EVAL_VIEW, policy=None, content_id=b"")


def measure_bounds(settings: BoundsSettings) -> Bounds:
    """All rates. Takes about ten times `probe_s`, the time to compile, and that to start a process for each core."""
    rates: dict[str, float] = {}
    with TemporaryDirectory(prefix="convoy-bench-bounds-") as folder, EveryCore() as cores:
        for stage in _Stage:
            make_round = partial(_stage_round, settings, folder, cores.num_processes, stage)
            rates[stage] = cores.rate(make_round, settings.probe_s)
        images_BCHW = _ready_batch(settings, folder)
        for name, precision, compiled in _engines(settings):
            make_forward = partial(_forward_round, settings, precision, compiled, images_BCHW.numpy())
            rates[name] = cores.fastest(make_forward, settings.probe_s, compiled=compiled)
    return Bounds(**rates, device="cuda" if torch.cuda.is_available() else "cpu")


def _backbone(settings: BoundsSettings) -> BackboneConfig:
    return _BACKBONE if settings.network is None else settings.network.backbone


def _stages(settings: BoundsSettings, folder: str, first: int = 0, step: int = 1) -> _Stages:
    """The stages over every so many of the images."""
    paths = list_images(settings.images)[:_MAX_IMAGES]
    return _Stages(paths[first::step] or paths, default_preset(_backbone(settings)), folder)


def _stage_round(
    settings: BoundsSettings, folder: str, num_processes: int, stage: _Stage, place: int
) -> Round:
    run_round: Round = getattr(_stages(settings, folder, place, num_processes), stage.value)
    return run_round


def _ready_batch(settings: BoundsSettings, folder: str) -> Tensor:
    """The first images as a batch, repeated if they are too few."""
    stages = _stages(settings, folder)
    stages.prepare()
    return stages.images_BCHW[torch.arange(settings.batch_size) % len(stages.images_BCHW)]


def _forward_round(
    settings: BoundsSettings,
    precision: Precision,
    compiled: bool,
    images_BCHW: np.ndarray,
    num_threads: int,
    _place: int,
) -> Round:
    """Some batches through the network, and the wait for the device at their end."""
    keep_freed_memory()
    backbone = _backbone(settings)
    network, preset = build_network(backbone), default_preset(backbone)
    axis = derive_depth_axis(network, input_px=preset.crop_px)
    fold_batch_norms(network, input_px=preset.crop_px)
    tap = resolve_tap(axis, "pooled" if settings.network is None else "logits").name
    options = EngineOptions(
        precision=precision, batch_size=settings.batch_size, compiled=compiled, num_threads=num_threads
    )
    engine = FeatureEngine(network, axis, preset, taps=[tap], options=options)
    batch_BCHW = engine.new_batch().copy_(torch.from_numpy(images_BCHW))

    def run_round() -> int:
        for _ in range(_BATCHES_A_ROUND):
            features = engine.run(batch_BCHW)
        features[tap].cpu()
        return _BATCHES_A_ROUND * len(batch_BCHW)

    return run_round


def _engines(settings: BoundsSettings) -> Iterator[tuple[str, Precision, bool]]:
    """The name, precision and form, compiled or not, of every network that is measured."""
    yield "forward_bf16", Precision.BF16, False
    yield "forward_fp32", Precision.FP32, False
    if settings.compiled:
        yield "forward_compiled", Precision.BF16, True


if __name__ == "__main__":
    print(measure_bounds(load_config(BoundsSettings, None, sys.argv[1:])).model_dump_json())
