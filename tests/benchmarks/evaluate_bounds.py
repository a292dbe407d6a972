"""What an evaluation could reach at most: nothing but forward passes, over one batch that is ready."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch
from evaluate_job import NUM_VIEWS, PLAN, EvaluateJob
from every_core import EveryCore, Round
from pydantic import PositiveFloat

from convoy.core.config import StrictModel, load_config
from convoy.core.crop_policies import num_slots
from convoy.core.processes import keep_freed_memory
from convoy.vision.backbones import depth_axis
from convoy.vision.decode_rule import DecodeRule
from convoy.vision.decoding import decode_image
from convoy.vision.engine import FeatureEngine
from convoy.vision.engine_options import EngineOptions, Precision, device_here
from convoy.vision.folding import fold_batch_norms
from convoy.vision.forward import new_images
from convoy.vision.multicrop import cut_slots
from convoy.vision.presets import geometry_of

_MAX_IMAGES = 64


class BoundsSettings(EvaluateJob):
    """How long each network is measured."""

    probe_s: PositiveFloat = 2.0


class EvaluateBounds(StrictModel):
    """Images a second by the number of networks, and what they were measured in.

    `forward`: 1 / (10 sum g), where g are the seconds that each network needs for one crop: of one process with all
    cores and, without a GPU, of a process for each core, whichever is faster. `prepare`: reading, decoding and cutting
    all crops, in a process for each core. `combined`: both on the same cores; beside a GPU the slower one.
    """

    forward: dict[int, float]
    prepare: float
    combined: dict[int, float]
    precision: Precision
    device: str


def measure_bounds(settings: BoundsSettings) -> EvaluateBounds:
    """All rates."""
    with EveryCore() as cores:
        prepare = cores.rate(partial(_prepare_round, settings, cores.num_processes), settings.probe_s)
        rates = {
            arch: cores.fastest(
                partial(_forward_round, settings, place), settings.probe_s, compiled=settings.compiled
            )
            for place, arch in enumerate(settings.archs)
            if arch not in settings.archs[:place]
        }
    seconds = [1 / rates[arch] for arch in settings.archs]
    forward = {size: 1 / (NUM_VIEWS * sum(seconds[:size])) for size in settings.sizes}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return EvaluateBounds(
        forward=forward,
        prepare=prepare,
        combined={
            size: min(rate, prepare) if device == "cuda" else 1 / (1 / rate + 1 / prepare)
            for size, rate in forward.items()
        },
        precision=device_here().precision,
        device=device,
    )


def _forward_round(settings: BoundsSettings, place: int, num_threads: int, _process: int) -> Round:
    """Some batches of crops through one network, and the wait for the device at their end."""
    keep_freed_memory()
    options = EngineOptions(
        precision=device_here().precision,
        batch_size=settings.batch_size,
        compiled=settings.compiled,
        num_threads=num_threads,
    )
    network = settings.network(place)
    axis = depth_axis(settings.backbone(place), network)
    fold_batch_norms(network, input_px=settings.crop_px)
    engine = FeatureEngine(network, axis, settings.preset, taps=["logits"], options=options)
    batch_BCHW = engine.new_batch()

    def run_round() -> int:
        for _ in range(NUM_VIEWS):
            logits_BK = engine.run(batch_BCHW)["logits"]
        logits_BK.cpu()
        return NUM_VIEWS * settings.batch_size

    return run_round


def _prepare_round(settings: BoundsSettings, num_processes: int, place: int) -> Round:
    """All crops of some of the images, read and decoded anew."""
    all_paths = settings.paths[:_MAX_IMAGES]
    paths = all_paths[place::num_processes] or all_paths
    shape = (num_slots(PLAN), 3, settings.crop_px, settings.crop_px)
    slots_SCHW = new_images(shape, torch.device("cpu"))
    geometry = geometry_of(settings.preset)

    def run_round() -> int:
        for path in paths:
            pixels_CHW = decode_image(Path(path).read_bytes(), DecodeRule()).pixels_CHW
            cut_slots(pixels_CHW, geometry, PLAN, slots_SCHW)
        return len(paths)

    return run_round


if __name__ == "__main__":
    print(measure_bounds(load_config(BoundsSettings, None, sys.argv[1:])).model_dump_json())
