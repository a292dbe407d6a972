from __future__ import annotations

import math

import pytest
import timm
import torchvision
from pydantic import ValidationError

from convoy.core.config import parse_config
from convoy.core.errors import ConfigError, ExitCode
from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.presets import EvalPreset


@pytest.mark.parametrize("std", [[0, 0, 0], [0.2, 0.2, -0.2], [0.2, math.inf, 0.2]])
def test_deviations_that_nothing_can_be_divided_by_are_refused(std: list[float]) -> None:
    settings = {"arch": "lenet5", "preset": {"std": std}}
    with pytest.raises(ConfigError, match=r"preset\.std\.\d: ") as caught:
        parse_config(BackboneConfig, settings, where="--set")
    assert caught.value.exit_code == ExitCode.USAGE


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_means_are_finite(value: float) -> None:
    with pytest.raises(ValidationError, match="finite"):
        EvalPreset(mean=(0.5, 0.5, value))


def test_published_normalisations_are_valid() -> None:
    configs = [timm.get_pretrained_cfg(name) for name in timm.list_pretrained()]
    normalised = {(config.mean, config.std) for config in configs if config is not None}
    for name in torchvision.models.list_models(torchvision.models):
        for member in torchvision.models.get_model_weights(name):
            transform = member.transforms()
            normalised.add((tuple(transform.mean), tuple(transform.std)))
    assert len(normalised) > 5
    for mean, std in normalised:
        preset = EvalPreset.model_validate({"mean": mean, "std": std})
        assert (preset.mean, preset.std) == (mean, std)
