"""How the cost of a backbone is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest

from cache_jobs import freeze, write_digits
from convoy.cluster import slices
from convoy.cluster.slices import WorkerPool
from convoy.cluster.timing_spec import BackboneTiming, TimingSpec
from convoy.core.progress import Silent
from convoy.pipelines import backbone_costs
from convoy.pipelines.backbone_costs import CostsConfig, _spec, measure_costs
from convoy.pipelines.feature_plan import ExtractionConfig
from convoy.pipelines.models import fetch_backbone
from convoy.storage.datasets import open_dataset
from convoy.storage.local_store import LocalStore
from convoy.vision.backbone_config import BackboneConfig
from made_bundles import FP32
from made_devices import made_device
from made_timing import TIMING


@pytest.mark.parametrize(
    ("told", "extraction", "expected"),
    [(8, ExtractionConfig(batch_size=64), 8), (None, ExtractionConfig(batch_size=64), 64), (None, FP32, 256)],
)
def test_batches_are_those_of_jobs_unless_they_are_told(
    tmp_path: Path, told: int | None, extraction: ExtractionConfig, expected: int
) -> None:
    config = BackboneConfig(arch="lenet5", weights="random")
    backbone = fetch_backbone(LocalStore(str(tmp_path)), config)
    settled = extraction.model_copy(update={"precision": FP32.precision})
    assert _spec(backbone, CostsConfig(batch_size=told), settled, "none", made_device).batch_size == expected


@pytest.mark.parametrize(("memory_gib", "num_workers", "num_threads"), [(64, 16, 1), (8, 3, 5)])
def test_costs_are_those_of_the_workers_of_a_large_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory_gib: int, num_workers: int, num_threads: int
) -> None:
    write_digits(tmp_path / "images" / "train", 4)
    freeze(tmp_path / "images", str(tmp_path / "workspace"))
    store, pools = LocalStore(str(tmp_path / "workspace")), []
    backbone = fetch_backbone(store, BackboneConfig(arch="lenet5", weights="random"))

    def supposed(
        workspace: str, asked: Sequence[tuple[TimingSpec, WorkerPool]], images: object
    ) -> Iterator[BackboneTiming]:
        for _, pool in asked:
            pools.append(pool)
            yield TIMING.model_copy(
                update={
                    "num_threads": pool.num_threads,
                    "num_workers": pool.num_workers,
                    "gpu_share": pool.num_gpus,
                }
            )

    node = {"CPU": 16.0, "GPU": 0.0, "memory": float(memory_gib << 30)}
    monkeypatch.setattr(slices, "alive_nodes", lambda: [node])
    monkeypatch.setattr(backbone_costs, "ray_session", nullcontext)
    monkeypatch.setattr(backbone_costs, "time_backbones", supposed)
    # With its weights, an operator takes a little more than 2 GiB.
    manifest, extraction = open_dataset(store, "digits"), FP32.model_copy(update={"batch_size": 8})
    (cost,) = measure_costs(store, manifest, [backbone], CostsConfig(), extraction, progress=Silent())
    (pool,) = pools
    assert (pool.num_workers, pool.num_threads) == (num_workers, num_threads)
    assert (cost.num_threads, cost.images_per_s) == (num_threads, 80 * num_workers)
    assert cost.from_store
