"""The training job on a real GPU: mixed precision, channels last, and the same promises as on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cache_jobs import freeze, write_digits
from command_lines import convoy_json, settings_arguments

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

PRESET = "{resize_px: null, crop_px: 32}"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("digits")
    for start, (split, num_rows) in zip(
        (0, 600, 800), (("train", 600), ("val", 200), ("test", 400)), strict=True
    ):
        write_digits(folder / "images" / split, num_rows, start=start)
    freeze(folder / "images", str(folder / "workspace"))
    return str(folder / "workspace")


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_a_network_learns_digits_on_a_gpu(workspace: str, precision: str) -> None:
    settings = settings_arguments(
        f"name=gpu-{precision}",
        "dataset=digits",
        "strategy=from_scratch",
        f"backbone={{arch: cifar_resnet20, preset: {PRESET}}}",
        "epochs=8",
        "augmentation={crop: {kind: random}, mirror: null}",
        f"recipe={{batch_size: 32, precision: {precision}, averaging: ema, ema_decay: 0.99}}",
    )
    report = convoy_json("train", "--workspace", workspace, *settings)
    assert report["top1"] > 0.8
    assert len(report["history"]) == 8
    assert Path(report["learning_curves"]).is_file()


def test_compiled_and_eager_training_learn_alike(workspace: str) -> None:
    losses = {}
    for name, compiled in (("eager", "false"), ("compiled", "true")):
        settings = settings_arguments(
            f"name=gpu-{name}",
            "dataset=digits",
            "strategy=from_scratch",
            f"backbone={{arch: cifar_resnet20, preset: {PRESET}}}",
            "epochs=2",
            f"recipe={{batch_size: 32, precision: fp32, compile: {compiled}}}",
        )
        report = convoy_json("train", "--workspace", workspace, *settings)
        losses[name] = [epoch["train_loss"] for epoch in report["history"]]
    assert losses["compiled"] == pytest.approx(losses["eager"], rel=0.05)
