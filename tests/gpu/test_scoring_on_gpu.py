"""Features and scores of a real GPU: in float32 those of a CPU, whatever crops and members, whatever its memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.dataset as pads
import pytest
import torch

from cache_jobs import CacheJob, cached_features, made_job
from convoy.storage.stores import open_store
from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.backbones import build_network
from convoy.vision.depth_axis import derive_depth_axis
from convoy.vision.engine import FeatureEngine
from convoy.vision.engine_options import EngineOptions, Precision
from convoy.vision.presets import EvalPreset
from made_bundles import made_classifier, write_classifier

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

NUM_IMAGES = 192
ON_CPU = {"CUDA_VISIBLE_DEVICES": ""}
RESNET = "{arch: cifar_resnet20, weights: random, preset: {resize_px: 36, crop_px: 32}}"
TWO_MEMBERS = "ensemble={members: [{bundle: one}, {bundle: two, weight: 2}]}"
# Of values near 1. With TF32 in convolutions they would be a hundred times as far apart.
FLOAT32_TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> CacheJob:
    """Digits, one of them damaged, and two bundles."""
    made = made_job(tmp_path_factory.mktemp("gpu"), num_images=NUM_IMAGES)
    store = open_store(made.workspace)
    for seed, name in enumerate(("one", "two")):
        write_classifier(store, name, made_classifier(store, seed))
    return made


def logits_of(job: CacheJob, environment: dict[str, str] | None = None) -> np.ndarray:
    report = job.run(environment)
    assert (report["results"], report["rejects"]) == (NUM_IMAGES - 1, 1)
    folder = Path(job.workspace, "runs", report["run"], "predictions")
    rows = pads.dataset(folder).to_table().sort_by("sample_id")
    return np.array(rows["logits"].to_pylist())


@pytest.mark.parametrize("crops", ["center", "ten"])
@pytest.mark.parametrize("members", ["bundle=one", TWO_MEMBERS])
def test_float32_scores_of_a_gpu_are_those_of_a_cpu(job: CacheJob, crops: str, members: str) -> None:
    extraction = "extraction={batch_size: 16, slice_rows: 48, precision: fp32}"
    scored = replace(
        job,
        verb="score",
        settings=("dataset=digits", members, f"crops={crops}", "columns.outputs=logits", extraction),
    )
    on_gpu = logits_of(scored.changed(f"name=gpu-{crops}-{members[:3]}"))
    on_cpu = logits_of(scored.changed(f"name=cpu-{crops}-{members[:3]}"), ON_CPU)
    assert on_cpu.std() > 0.01
    np.testing.assert_allclose(on_gpu, on_cpu, atol=FLOAT32_TOLERANCE)


def test_float32_features_of_a_gpu_are_those_of_a_cpu(job: CacheJob, tmp_path: Path) -> None:
    extraction = "extraction={batch_size: 16, slice_rows: 48, precision: fp32, dtype: float32}"
    features = {}
    for name, environment in (("gpu", None), ("cpu", ON_CPU)):
        one = job.copied_to(tmp_path / name).changed(f"backbone={RESNET}", "taps=[pooled]", extraction)
        features[name] = cached_features(one.workspace, one.run(environment)["sets"]["pooled/0"])
    assert features["gpu"].keys() == features["cpu"].keys()
    on_gpu, on_cpu = (np.stack([one[key] for key in sorted(one)]) for one in features.values())
    assert np.abs(on_cpu).max() > 0.1
    np.testing.assert_allclose(on_gpu, on_cpu, atol=FLOAT32_TOLERANCE * np.abs(on_cpu).max())


def test_bf16_features_of_a_gpu_say_how_far_they_are_from_float32(job: CacheJob, tmp_path: Path) -> None:
    extraction = "extraction={batch_size: 16, slice_rows: 48, precision: auto}"
    report = job.copied_to(tmp_path).changed(f"backbone={RESNET}", "taps=[pooled]", extraction).run()
    assert report["precision"] == "bf16"
    (cosine,) = report["precision_effect"].values()
    assert 0.99 < cosine < 1


@pytest.fixture
def small_memory() -> Iterator[int]:
    """A GPU that gives this process 1 GiB; the number of bytes."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(2**30 / total)
    yield 2**30
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_batch_that_the_gpu_has_no_room_for_is_run_in_parts(small_memory: int, compiled: bool) -> None:
    # The first convolution alone gives 512 x 64 x 112 x 112 values: more than there is room for.
    assert small_memory < 4 * 512 * 64 * 112 * 112
    large, small = (made_engine(size, compiled=compiled and size > 64) for size in (512, 64))
    images_BCHW = large.new_batch()
    noise_BCHW = torch.randint(0, 256, images_BCHW.shape, generator=torch.Generator().manual_seed(0))
    images_BCHW.copy_(noise_BCHW)
    features_BD = large.run(images_BCHW)["pooled"].cpu()
    assert torch.cuda.max_memory_allocated() < small_memory
    expected_BD = torch.cat([small.run(part)["pooled"].cpu() for part in images_BCHW.split(64)])
    torch.testing.assert_close(features_BD, expected_BD, rtol=1e-3, atol=1e-4)


def made_engine(batch_size: int, *, compiled: bool) -> FeatureEngine:
    """ResNet-18 at 224 pixels in float32."""
    preset = EvalPreset(resize_px=256, crop_px=224)
    network = build_network(BackboneConfig(arch="torchvision:resnet18", weights="random"))
    axis = derive_depth_axis(network, input_px=preset.crop_px)
    options = EngineOptions(precision=Precision.FP32, batch_size=batch_size, compiled=compiled, num_threads=4)
    return FeatureEngine(network, axis, preset, taps=["pooled"], options=options)
