"""Convoy: one decode an image, all crops cut at once, all networks of a committee in turn on every batch."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import torch
from evaluate_job import PLAN, CommitteeRates, EvaluateJob, num_cores, save_joint
from torch import Tensor

from convoy.core.batching import batched
from convoy.core.config import load_config
from convoy.vision.committee import Committee, Member
from convoy.vision.committee_options import CommitteeOptions, MemberOptions
from convoy.vision.decode_rule import DecodeRule
from convoy.vision.decoding import decode_image
from convoy.vision.engine_options import Precision, best_precision
from convoy.vision.multicrop import cut_slots
from convoy.vision.presets import CropGeometry

_BATCHES_AHEAD = 2

Batch = dict[CropGeometry, Tensor]


class OursSettings(EvaluateJob):
    """What the networks compute in; null: the best of this machine."""

    precision: Precision | None = None


def run_ours(settings: OursSettings) -> CommitteeRates:
    """The rate of each committee from its first read to its last output; networks are warm before that."""
    rates = {}
    for size in settings.sizes:
        committee = _committee(settings, size)
        committee.warm_up()
        started_s = time.perf_counter()
        logits_NK = np.concatenate(list(_evaluate(committee, settings.paths)))
        rates[size] = len(logits_NK) / (time.perf_counter() - started_s)
        if size == len(settings.archs):
            save_joint(settings, np.exp(logits_NK.astype(np.float64)))
    return CommitteeRates(num_images=len(settings.paths), images_per_s=rates)


def _committee(settings: OursSettings, size: int) -> Committee:
    options = MemberOptions(
        preset=settings.preset, precision=settings.precision or best_precision(), weight=1 / size
    )
    members = [Member(settings.network(place), options) for place in range(size)]
    return Committee(
        members,
        CommitteeOptions(batch_size=settings.batch_size, compiled=False, num_threads=num_cores(), plan=PLAN),
    )


def _evaluate(committee: Committee, paths: Sequence[str]) -> Iterator[np.ndarray]:
    with ThreadPoolExecutor(num_cores(), "decode") as decoders:
        for batch, num_images in _prepared(committee, paths, decoders):
            yield committee.run(batch).logits_BK[:num_images].cpu().numpy()


def _prepared(
    committee: Committee, paths: Sequence[str], decoders: ThreadPoolExecutor
) -> Iterator[tuple[Batch, int]]:
    """Filled batches, while the next ones are being read and decoded."""
    free = [committee.new_batch() for _ in range(_BATCHES_AHEAD + 1)]
    waiting = deque()
    for chosen in batched(paths, committee.options.batch_size):
        if not free:
            batch, futures = waiting.popleft()
            wait(futures)
            yield batch, len(futures)
            free.append(batch)
        batch = free.pop()
        futures = [decoders.submit(_fill, path, batch, place) for place, path in enumerate(chosen)]
        waiting.append((batch, futures))
    for batch, futures in waiting:
        wait(futures)
        yield batch, len(futures)


def _fill(path: str, batch: Batch, place: int) -> None:
    pixels_CHW = decode_image(Path(path).read_bytes(), DecodeRule()).pixels_CHW
    for geometry, images_BSCHW in batch.items():
        cut_slots(pixels_CHW, geometry, PLAN, images_BSCHW[place])


if __name__ == "__main__":
    torch.set_num_threads(num_cores())
    print(run_ours(load_config(OursSettings, None, sys.argv[1:])).model_dump_json())
