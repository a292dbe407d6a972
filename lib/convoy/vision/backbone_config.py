"""Which network, with which weights: the config of a backbone. Free of torch, so that drivers plan in a second."""

from __future__ import annotations

from enum import StrEnum
from pathlib import PurePosixPath
from typing import Annotated

from pydantic import Field, PositiveInt, model_validator

from convoy.core.config import StrictModel
from convoy.vision.presets import EvalPreset

# `model_best.pth.tar`, which PyTorch's own examples write, is no archive.
_WEIGHT_FILES = frozenset({".safetensors", ".pt", ".pth", ".th", ".tar", ".bin", ".ckpt"})
DEFAULT_WEIGHTS_NAME = "DEFAULT"
# The prefixes of libraries; any other name with a colon is that of a factory.
TORCHVISION, TIMM = "torchvision:", "timm:"


class ConvLayer(StrictModel):
    """A new convolution with BatchNorm and ReLU: `width` channels, a square kernel of odd size."""

    width: PositiveInt = 256
    kernel_px: PositiveInt = 3
    stride: PositiveInt = 1

    @model_validator(mode="after")
    def _kernel_has_a_centre(self) -> ConvLayer:
        if self.kernel_px % 2 == 0:
            raise ValueError("kernel_px must be odd")
        return self


class NewLayers(StrictModel):
    """New layers in place of everything behind the stage `after`, which is named or numbered like a tap.

    The convolutions, global average pooling, then an MLP with ReLU and dropout behind each hidden layer.
    """

    after: str | int
    convs: tuple[ConvLayer, ...] = (ConvLayer(), ConvLayer())
    hidden_widths: tuple[PositiveInt, ...] = (256,)
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2


class BackboneConfig(StrictModel):
    """Which network, and with which weights.

    `arch` is "torchvision:<name>", "timm:<name>", "lenet5", "cifar_resnet20" (32, 44, 56, 110), or
    "package.module:factory". `weights` is a name that the library knows (a member of torchvision's weights
    enum, a tag of timm, or "DEFAULT"), "random", or the path or s3:// URI of a state dict. `preset` replaces that of
    the weights, and `num_classes` that of the architecture for random weights and state dicts; weights that the library
    names have their own. With 0 classes a network of timm has no classifier.
    `weights_digest` pins the weights' content, and `code_digest` the file in which a factory is written, which jobs
    fill in where it is not given.
    With `new_layers` the network ends at an early stage of the architecture and goes on with layers of its own.
    """

    arch: str
    weights: str = DEFAULT_WEIGHTS_NAME
    seed: int = Field(default=0, ge=0)
    num_classes: int | None = Field(default=None, ge=0)
    preset: EvalPreset | None = None
    weights_digest: str | None = Field(default=None, pattern="^[0-9a-f]{32}$")
    # Left out where there is none: the identities of all other networks are what they were before factories had it.
    code_digest: str | None = Field(
        default=None, pattern="^[0-9a-f]{32}$", exclude_if=lambda value: value is None
    )
    new_layers: NewLayers | None = None

    @model_validator(mode="after")
    def _keys_fit_together(self) -> BackboneConfig:
        if self.new_layers is not None and not self.num_classes:
            raise ValueError("new_layers need num_classes")
        if self.num_classes == 0 and not self.arch.startswith(TIMM):
            raise ValueError("num_classes must be above 0: only timm builds networks without a classifier")
        if self.code_digest is not None and not is_factory(self.arch):
            raise ValueError("code_digest is that of a package.module:factory")
        return self


def is_factory(arch: str) -> bool:
    """Whether an architecture is the user's own `package.module:factory`."""
    return ":" in arch and not arch.startswith((TORCHVISION, TIMM))


class WeightSource(StrEnum):
    """Where the weights of a backbone come from, and so who has to bring them."""

    RANDOM = "random"
    TRAINED = "trained"
    NAMED = "named"
    URI = "uri"


def weight_source(config: BackboneConfig) -> WeightSource:
    """RANDOM: what `build_network` gives. NAMED: `build_pretrained`. URI: read the bytes at `weights`.

    TRAINED: they lie in the bundle that a training wrote, under the network's `weights_digest`.
    """
    if config.weights in (WeightSource.RANDOM, WeightSource.TRAINED):
        return WeightSource(config.weights)
    is_file = "/" in config.weights or PurePosixPath(config.weights).suffix.lower() in _WEIGHT_FILES
    return WeightSource.URI if is_file else WeightSource.NAMED
