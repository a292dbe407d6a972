from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from cache_jobs import freeze, write_digits
from convoy.cluster import backbone_meter
from convoy.cluster.backbone_meter import measure_backbone
from convoy.cluster.backbone_timing import machine_of_workers
from convoy.cluster.slices import WorkerPool
from convoy.cluster.timing_spec import TimingSpec, keep_timing, kept_timing
from convoy.core.machine import machine_facts
from convoy.pipelines.models import fetch_backbone
from convoy.storage.datasets import open_dataset
from convoy.storage.local_store import LocalStore
from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.decode_rule import DecodeRule
from convoy.vision.engine_options import Precision, facts_here
from convoy.vision.presets import EvalPreset
from made_timing import TIMING

PRESET = EvalPreset(resize_px=32, crop_px=32)
HERE, ELSEWHERE = TIMING.machine, machine_facts("A GPU")
SPEC = TimingSpec(
    weights_key="models/backbones/made/model.safetensors",
    weights_digest="0" * 32,
    backbone=BackboneConfig(arch="lenet5", weights="random", preset=PRESET),
    preset=PRESET,
    decode_rule=DecodeRule(),
    precision=Precision.FP32,
    compiled=False,
    batch_size=32,
    num_workers=None,
    cpus_per_worker=None,
    num_fetch_threads=16,
    seconds=1.0,
    num_latencies=10,
    images_digest="made",
)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    store = LocalStore(str(tmp_path))
    keep_timing(store, SPEC, TIMING)
    return store


def test_what_was_measured_is_found_again_on_such_a_machine(store: LocalStore) -> None:
    assert kept_timing(store, SPEC, HERE) == TIMING
    assert kept_timing(store, SPEC, ELSEWHERE) is None


@pytest.mark.parametrize(
    "change",
    [
        {"precision": Precision.BF16},
        {"preset": EvalPreset(resize_px=64, crop_px=64)},
        {"weights_digest": "1" * 32},
        {"batch_size": 8},
        {"compiled": True},
        {"cpus_per_worker": 1},
        {"images_digest": "others"},
    ],
)
def test_what_is_run_otherwise_is_measured_anew(store: LocalStore, change: dict[str, Any]) -> None:
    assert kept_timing(store, SPEC.model_copy(update=change), HERE) is None


@pytest.mark.parametrize(
    ("num_workers", "gpu_share", "job_images_per_s", "expected"),
    [
        (1, 0, 80, 80),
        (3, 0, 80, 240),
        (3, 0, None, 300),
        # Eight GPUs of three workers each: decoding is the limit, then the GPUs are.
        (24, 1 / 3, 20, 480),
        (24, 1 / 3, 80, 800),
        (8, 1, None, 800),
    ],
)
def test_the_rate_of_a_cluster_is_that_of_its_workers_as_far_as_its_gpus_go(
    num_workers: int, gpu_share: float, job_images_per_s: float | None, expected: float
) -> None:
    timing = TIMING.model_copy(
        update={"num_workers": num_workers, "gpu_share": gpu_share, "job_images_per_s": job_images_per_s}
    )
    assert timing.cluster_images_per_s == pytest.approx(expected)


def test_only_a_cluster_elsewhere_has_to_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert machine_of_workers() == facts_here()
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    assert machine_of_workers() is None


def pool_of(num_threads: int, num_workers: int = 2) -> WorkerPool:
    return WorkerPool(num_workers=num_workers, num_cpus=0.5, num_gpus=0, num_threads=num_threads)


def test_a_worker_is_timed_as_the_workers_of_jobs_decode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of a single thread decodes in it, and what was measured with other threads says nothing about it."""
    write_digits(tmp_path / "images" / "train", 3)
    freeze(tmp_path / "images", str(tmp_path / "workspace"))
    store = LocalStore(str(tmp_path / "workspace"))
    images = open_dataset(store, "digits").read_table()
    weights_key = fetch_backbone(store, SPEC.backbone).weights_key
    spec = SPEC.model_copy(update={"weights_key": weights_key, "seconds": 0.01, "batch_size": 2})
    threads, prepare = [], backbone_meter.prepare_view

    def watch(*arguments: Any, **options: Any) -> None:
        threads.append(threading.current_thread().name.startswith("decode"))
        prepare(*arguments, **options)

    monkeypatch.setattr(backbone_meter, "prepare_view", watch)
    alone = measure_backbone(store.root_uri, spec, images, pool_of(1))
    assert threads
    assert not any(threads)
    assert measure_backbone(store.root_uri, spec, images, pool_of(1, 8)) == alone.model_copy(
        update={"num_workers": 8}
    )
    threads.clear()
    assert measure_backbone(store.root_uri, spec, images, pool_of(2)).num_threads == 2
    assert all(threads)
