"""Which network, with which weights: the config of a backbone. Free of torch, so that drivers plan in a second."""

from __future__ import annotations

from enum import StrEnum
from pathlib import PurePosixPath

from pydantic import Field

from convoy.core.config import StrictModel
from convoy.vision.presets import EvalPreset

_WEIGHT_FILES = frozenset({".safetensors", ".pt", ".pth", ".th"})
DEFAULT_WEIGHTS_NAME = "DEFAULT"


class BackboneConfig(StrictModel):
    """Which network, and with which weights.

    `arch` is "torchvision:<name>", "timm:<name>", "lenet5", "cifar_resnet20" (32, 44, 56, 110), or
    "package.module:factory". `weights` is a name that the library knows (a member of torchvision's weights
    enum, a tag of timm, or "DEFAULT"), "random", or the path or s3:// URI of a state dict. `num_classes` and
    `preset` replace those of the architecture and of the weights. `weights_digest` pins the weights' content.
    """

    arch: str
    weights: str = DEFAULT_WEIGHTS_NAME
    seed: int = Field(default=0, ge=0)
    num_classes: int | None = Field(default=None, gt=0)
    preset: EvalPreset | None = None
    weights_digest: str | None = Field(default=None, pattern="^[0-9a-f]{32}$")


class WeightSource(StrEnum):
    """Where the weights of a backbone come from, and so who has to bring them."""

    RANDOM = "random"
    NAMED = "named"
    URI = "uri"


def weight_source(config: BackboneConfig) -> WeightSource:
    """RANDOM: what `build_network` gives. NAMED: `build_pretrained`. URI: read the bytes at `weights`."""
    if config.weights == WeightSource.RANDOM:
        return WeightSource.RANDOM
    is_file = PurePosixPath(config.weights).suffix.lower() in _WEIGHT_FILES
    return WeightSource.URI if is_file else WeightSource.NAMED
