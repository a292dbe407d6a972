"""float32 is float32 in every worker that runs networks, also where cuDNN would convolve in TF32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from convoy.cluster.inspection import Inspector
from convoy.cluster.inspection_spec import InspectionSpec, NetworkSpec
from convoy.cluster.training_loop import TrainingWorker
from convoy.pipelines.models import fetch_backbone
from convoy.storage.local_store import LocalStore
from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.decode_rule import DecodeRule
from convoy.vision.inspection_options import MaximisationOptions
from made_training import RUN_ID, GroupOfOne, digit_rows, training_spec


def open_trainer(folder: Path) -> TrainingWorker:
    return TrainingWorker(training_spec(folder, digit_rows(folder, 10)), GroupOfOne(), None)


def open_inspector(folder: Path) -> Inspector:
    config = BackboneConfig(arch="lenet5", weights="random", num_classes=10)
    backbone = fetch_backbone(LocalStore(str(folder)), config)
    network = NetworkSpec(
        backbone=backbone.config,
        weights_key=backbone.weights_key,
        preset=backbone.preset,
        tap="logits",
        head=None,
        head_key=None,
        output_groups=None,
        stages=(),
    )
    return Inspector(
        InspectionSpec(
            workspace=str(folder),
            run_id=RUN_ID,
            prefix="pictures/",
            network=network,
            maximisation=MaximisationOptions(),
            decode_rule=DecodeRule(),
            pieces={},
            num_threads=1,
            num_fetch_threads=1,
            stall_s=600,
        )
    )


@pytest.mark.parametrize("open_worker", [open_trainer, open_inspector])
def test_a_worker_convolves_float32_as_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, open_worker: Callable[[Path], object]
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    open_worker(tmp_path)
    assert not torch.backends.cudnn.allow_tf32
