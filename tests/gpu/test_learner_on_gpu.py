"""A training step on a real GPU: the host hands out work and never waits for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.backbones import build_network, depth_axis
from convoy.vision.learner import Learner, TrainBatch, validation_sums
from convoy.vision.presets import EvalPreset
from convoy.vision.training_config import Phase, Recipe, TrainingPrecision

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

PRESET = EvalPreset(resize_px=None, crop_px=32)
RESNET = BackboneConfig(arch="cifar_resnet20", weights="random", num_classes=5)
BATCH = TrainBatch(
    images_BCHW=torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8),
    labels_B=torch.arange(8) % 5,
    weights_B=torch.ones(8),
)


@pytest.fixture
def waiting_is_an_error() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("waiting_is_an_error")
@pytest.mark.parametrize(
    "settings",
    [{}, {"label_smoothing": 0.1, "clip_norm": 1.0}, {"mixup_alpha": 0.8}, {"cutmix_alpha": 1.0}],
)
@pytest.mark.parametrize("is_group", [False, True])
def test_a_step_and_a_validation_batch_do_not_wait_for_the_gpu(
    settings: dict[str, Any], is_group: bool
) -> None:
    axis = depth_axis(RESNET, build_network(RESNET))
    network = build_network(RESNET).cuda()
    learner = Learner(
        network,
        axis,
        model=network,
        preset=PRESET,
        phase=Phase(name="train", epochs=1, learning_rate=0.01),
        recipe=Recipe(precision=TrainingPrecision.BF16, **settings),
        class_weights_K=torch.ones(5),
    )
    learner.begin_epoch()
    sums: list[Tensor] = []
    for step in range(2):  # the first one also makes what the later ones find
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        # As a group counts its images.
        num_rows = torch.full((), 8, dtype=torch.float32, device="cuda") if is_group else 8
        learner.step([BATCH], num_group_rows=num_rows, factor=1.0, step=step)
        sums.append(validation_sums(network, PRESET, BATCH, TrainingPrecision.BF16))
    torch.cuda.set_sync_debug_mode("default")
    assert learner.sums_3[2] == 16
    assert [float(one[2]) for one in sums] == [8, 8]
