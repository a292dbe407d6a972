"""Backbones: which network, with which weights, and what it expects of its images."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from enum import StrEnum
from pathlib import PurePosixPath

import torch
from pydantic import Field
from torch import nn

from convoy.core.config import StrictModel
from convoy.core.errors import ConfigError, ConvoyError, StoreUnavailable
from convoy.vision.libraries import Classics, Factories, NetworkLibrary, Timm, Torchvision
from convoy.vision.presets import EvalPreset

_WEIGHT_FILES = frozenset({".safetensors", ".pt", ".pth", ".th"})
_DEFAULT = "DEFAULT"


class BackboneConfig(StrictModel):
    """Which network, and with which weights.

    `arch` is "torchvision:<name>", "timm:<name>", "lenet5", "cifar_resnet20" (32, 44, 56, 110), or
    "package.module:factory". `weights` is a name that the library knows (a member of torchvision's weights
    enum, a tag of timm, or "DEFAULT"), "random", or the path or s3:// URI of a state dict. `num_classes` and
    `preset` replace those of the architecture and of the weights. `weights_digest` pins the weights' content.
    """

    arch: str
    weights: str = _DEFAULT
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


def build_network(config: BackboneConfig) -> nn.Module:
    """The network in eval mode, with random weights that depend on nothing but the seed. Fetches nothing.

    The global random generators stay as they are. Raises ConfigError for an unknown arch, with the nearest.
    """
    library, name = _locate(config.arch)
    options = {} if config.num_classes is None else {"num_classes": config.num_classes}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        return library.build(name, **options).eval()


def build_pretrained(config: BackboneConfig) -> nn.Module:
    """The network as its named weights were published, with their classes, in eval mode.

    Raises ConfigError if the library has no such weights, and StoreUnavailable if they cannot be downloaded.
    """
    library, name = _locate(config.arch)
    try:
        with torch.random.fork_rng(devices=[]):
            return library.pretrained(name, config.weights).eval()
    except ConvoyError:
        raise
    except Exception as error:
        # The loaders promise no types: a network fault, a wrong hash and a full disk all look different.
        raise StoreUnavailable(
            f"the weights '{config.weights}' could not be downloaded: {error}",
            where=config.arch,
            next_step="check the network; or set backbone.weights to the path or URI of a state dict",
        ) from error


def default_preset(config: BackboneConfig) -> EvalPreset:
    """The preset of the config, else the one that its weights were trained with.

    Random weights and files take that of the architecture's default weights. Raises ConfigError where none is
    known, or the named weights do not exist.
    """
    if config.preset is not None:
        return config.preset
    library, name = _locate(config.arch)
    return library.preset(name, config.weights if weight_source(config) is WeightSource.NAMED else _DEFAULT)


def pretrained_classes(config: BackboneConfig) -> tuple[str, ...] | None:
    """The names of the classes of named weights, in the order of the logits, where the library knows."""
    if weight_source(config) is not WeightSource.NAMED:
        return None
    library, name = _locate(config.arch)
    return library.classes(name, config.weights)


def native_px(config: BackboneConfig) -> int:
    """The input size that the architecture was made for, whatever the preset of a job says.

    The depth axis is derived at this size, so that one depth means the same layer in every job. Only for a
    factory, of which nothing else is known, is it the size of the config's preset.
    """
    library, name = _locate(config.arch)
    if isinstance(library, Factories):
        return default_preset(config).crop_px
    return library.preset(name, _DEFAULT).crop_px


def _locate(arch: str) -> tuple[NetworkLibrary, str]:
    """The library of an architecture, and its name there."""
    libraries: tuple[NetworkLibrary, ...] = (Torchvision(), Timm(), Classics())
    for library in libraries:
        name = arch.removeprefix(library.prefix)
        if arch.startswith(library.prefix) and name in library.names():
            return library, name
    if ":" in arch and not arch.startswith((Torchvision.prefix, Timm.prefix)):
        return Factories(), arch
    raise ConfigError(
        f"there is no architecture '{arch}'",
        where="backbone.arch",
        next_step=f"choose one of {', '.join(_nearest(arch, libraries))}",
    )


def _nearest(arch: str, libraries: Sequence[NetworkLibrary]) -> list[str]:
    """The archs with the most similar names in any library, the most similar first."""
    wanted = arch.partition(":")[2] or arch
    close = {
        library.prefix + name: difflib.SequenceMatcher(None, wanted, name).ratio()
        for library in libraries
        for name in difflib.get_close_matches(wanted, library.names())
    }
    forms = [f"{library.prefix}<name>" for library in libraries if library.prefix]
    return sorted(close, key=lambda name: -close[name])[:4] or forms
