"""What a gate saves, and what it changes: real networks on real images, calibrated on other rows than measured."""

from __future__ import annotations

import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evaluate_job import num_cores
from images import real_data
from pydantic import PositiveInt
from torch import Tensor

from convoy.core.config import StrictModel, load_config
from convoy.core.crop_policies import CropPlan, CropPolicy, MemberOutputs, crop_views
from convoy.core.errors import ConfigError
from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.backbones import build_network, default_preset
from convoy.vision.committee import Committee, Member
from convoy.vision.committee_options import (
    CommitteeOptions,
    GateOptions,
    GateStage,
    MemberOptions,
    gate_passes,
)
from convoy.vision.decode_rule import DecodeRule
from convoy.vision.decoding import decode_image
from convoy.vision.engine_options import Precision
from convoy.vision.gate_calibration import GateCalibration
from convoy.vision.gating import GatedCommittee
from convoy.vision.multicrop import cut_slots
from convoy.vision.weights import load_weights, read_state_dict

ARCHIVE, WEIGHTS = "cifar10-jpeg.tar.gz", "cifar10-resnets"
_DEPTHS = (20, 32, 44, 56)
_CURVE = (0.97, 0.98, 0.99, 0.995, 0.998)
_PLAN = CropPlan(policy=CropPolicy.FLIP)


class GatedSettings(StrictModel):
    """`num_images` test images, every other one to calibrate on.

    There the agreement must be at least `target_agreement`, at a one-sided `confidence`.
    """

    data: str | None = None
    num_images: PositiveInt = 2000
    batch_size: PositiveInt = 64
    target_agreement: float = 0.995
    confidence: float = 0.9


class GatePoint(StrictModel):
    """What a gate that was calibrated for a target does on the other images."""

    target_agreement: float
    agreement: float
    speedup: float
    top1: float


class GatedResult(StrictModel):
    """On the images that the gate was not calibrated on.

    `agreement` is the share with the same top-1 class as the exact committee; `speedup` is in network passes,
    `time_ratio` in seconds of the networks. `curve` shows other targets.
    """

    num_images: int
    gate: GateOptions
    agreement: float
    speedup: float
    time_ratio: float
    top1: float
    exact_top1: float
    curve: list[GatePoint]


def measure_gate(settings: GatedSettings) -> GatedResult:
    """Calibrate on even images, measure on odd ones, both committees on the same batches in turn.

    Raises ConfigError where the real data are missing.
    """
    committee = _committee(settings)
    images, labels_N = _read_images(settings)
    even, odd = slice(0, None, 2), slice(1, None, 2)
    calibration = _calibration(committee, list(_batches(committee, images[even])))
    gate = calibration.best_gate(settings.target_agreement, confidence=settings.confidence).gate
    gated = GatedCommittee(committee, gate)
    batches = list(_batches(committee, images[odd]))
    exact_N, exact_s = _timed(lambda: _exact_classes(committee, batches))
    (gated_N, num_rows), gated_s = _timed(lambda: _gated_classes(gated, batches))
    num_images, labels_N = len(exact_N), labels_N[odd]
    passes = gate_passes(gate, _PLAN, len(committee.weights))
    mean_passes = sum(passes[stage] * count for stage, count in num_rows.items()) / num_images
    return GatedResult(
        num_images=num_images,
        gate=gate,
        agreement=float((exact_N == gated_N).mean()),
        speedup=passes[GateStage.COMMITTEE] / mean_passes,
        time_ratio=exact_s / gated_s,
        top1=float((gated_N == labels_N).mean()),
        exact_top1=float((exact_N == labels_N).mean()),
        curve=list(_curve(calibration, _calibration(committee, batches), labels_N, settings)),
    )


def _committee(settings: GatedSettings) -> Committee:
    folder = _real(WEIGHTS, settings)
    members = []
    for depth in _DEPTHS:
        backbone = BackboneConfig(arch=f"cifar_resnet{depth}", num_classes=10)
        network = build_network(backbone)
        (path,) = folder.glob(f"resnet{depth}-*.th")
        load_weights(network, read_state_dict(path))
        options = MemberOptions(
            preset=default_preset(backbone), precision=Precision.FP32, weight=1 / len(_DEPTHS)
        )
        members.append(Member(network, options))
    options = CommitteeOptions(
        batch_size=settings.batch_size, compiled=False, num_threads=num_cores(), plan=_PLAN
    )
    return Committee(members, options)


def _read_images(settings: GatedSettings) -> tuple[list[Tensor], np.ndarray]:
    """Test images evenly out of all classes, and their classes."""
    with tarfile.open(_real(ARCHIVE, settings)) as tar:
        encoded = {
            member.name: tar.extractfile(member).read()  # type: ignore[union-attr]
            for member in tar
            if member.isfile() and "test/" in member.name
        }
    names = sorted(encoded)[:: max(1, len(encoded) // settings.num_images)][: settings.num_images]
    classes = sorted({Path(name).parent.name for name in encoded})
    pixels = [decode_image(encoded[name], DecodeRule()).pixels_CHW for name in names]
    return pixels, np.array([classes.index(Path(name).parent.name) for name in names])


def _real(name: str, settings: GatedSettings) -> Path:
    path = real_data(name, settings.data)
    if path is None:
        raise ConfigError(f"there is no {name}", where="data", next_step="set it, or CONVOY_TEST_DATA")
    return path


def _batches(committee: Committee, images: Sequence[Tensor]) -> Iterator[tuple[dict[Any, Tensor], range]]:
    """Filled batches with the numbers of their rows."""
    size = committee.options.batch_size
    for start in range(0, len(images), size):
        batch, chosen = committee.new_batch(), images[start : start + size]
        for geometry, images_BSCHW in batch.items():
            for place, pixels_CHW in enumerate(chosen):
                cut_slots(pixels_CHW, geometry, _PLAN, images_BSCHW[place])
        yield batch, range(start, start + len(chosen))


def _exact_classes(committee: Committee, batches: Sequence[tuple[Any, range]]) -> np.ndarray:
    chosen = [committee.run(batch).logits_BK[: len(rows)].argmax(dim=1) for batch, rows in batches]
    return torch.cat(chosen).cpu().numpy()


def _gated_classes(
    gated: GatedCommittee, batches: Sequence[tuple[Any, range]]
) -> tuple[np.ndarray, Counter[GateStage]]:
    """The class of each row, and how many rows were final at each stage."""
    finished = [rows for batch, numbers in batches for rows in gated.run(batch, numbers)] + gated.flush()
    classes_N, num_rows = np.zeros(batches[-1][1].stop, dtype=np.int64), Counter[GateStage]()
    for one in finished:
        classes_N[list(one.rows)] = one.logits_BK.argmax(dim=1).cpu().numpy()
        num_rows[one.stage] += len(one.rows)
    return classes_N, num_rows


def _calibration(committee: Committee, batches: Sequence[tuple[Any, range]]) -> GateCalibration:
    outputs = [
        committee.run(batch, MemberOutputs.VIEWS).view_logits_MVBK[:, :, : len(rows)]
        for batch, rows in batches
    ]
    return GateCalibration(
        torch.cat(outputs, dim=2).cpu().numpy(),
        weights_M=committee.weights,
        temperatures_M=[1.0] * len(committee.weights),
        averaging=committee.options.averaging,
        plan=_PLAN,
    )


def _curve(
    calibration: GateCalibration, unseen: GateCalibration, labels_N: np.ndarray, settings: GatedSettings
) -> Iterator[GatePoint]:
    num_passes = len(_DEPTHS) * len(crop_views(_PLAN))
    for target in _CURVE:
        gate = calibration.best_gate(target, confidence=settings.confidence).gate
        found = unseen.measured(gate)
        yield GatePoint(
            target_agreement=target,
            agreement=found.agreement,
            speedup=num_passes / found.mean_passes,
            top1=float((found.class_N == labels_N).mean()),
        )


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    started_s = time.perf_counter()
    result = work()
    return result, time.perf_counter() - started_s


if __name__ == "__main__":
    print(measure_gate(load_config(GatedSettings, None, sys.argv[1:])).model_dump_json())
