"""Backbones: which network, with which weights, and what it expects of its images."""

from __future__ import annotations

import contextlib
import difflib
import json
import sys
from collections.abc import Sequence

import torch
from torch import nn

from convoy.core.errors import ConfigError, ConvoyError, StoreUnavailable, VersionMismatch
from convoy.vision.backbone_config import (
    DEFAULT_WEIGHTS_NAME,
    BackboneConfig,
    WeightSource,
    is_factory,
    weight_source,
)
from convoy.vision.depth_axis import derive_depth_axis
from convoy.vision.factories import with_pinned_code
from convoy.vision.libraries import Classics, Factories, NetworkLibrary, Timm, Torchvision
from convoy.vision.partial_reuse import PartialReuseNetwork
from convoy.vision.presets import EvalPreset
from convoy.vision.stages import DepthAxis


def build_network(config: BackboneConfig) -> nn.Module:
    """The network in eval mode, with random weights that depend on nothing but the seed. Fetches nothing.

    The global random generators stay as they are. Raises ConfigError for an unknown arch, with the nearest, and
    VersionMismatch for a factory whose code is not that by which the network was made.
    """
    library, name = _locate(config.arch)
    if config.code_digest is not None:
        with_pinned_code(config)
    keeps_head = config.num_classes is not None and config.new_layers is None
    options = {"num_classes": config.num_classes} if keeps_head else {}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        network = library.build(name, **options)
        if config.new_layers is not None and config.num_classes is not None:
            axis = derive_depth_axis(network, input_px=native_px(config))
            network = PartialReuseNetwork(network, axis, config.new_layers, num_classes=config.num_classes)
        return network.eval()


def depth_axis(config: BackboneConfig, network: nn.Module) -> DepthAxis:
    """The depth axis of a network that was built from the config."""
    if isinstance(network, PartialReuseNetwork):
        return network.axis
    return derive_depth_axis(network, input_px=native_px(config), num_classes=config.num_classes)


def require_recorded(config: BackboneConfig, axis: DepthAxis, num_classes: int) -> None:
    """VersionMismatch where the record of a network counts other classes than its axis.

    Depths of networks without classifier were counted otherwise before.
    """
    if axis.num_classes != num_classes:
        raise VersionMismatch(
            f"the network has {axis.num_classes} classes, and its record from before says {num_classes}: what its tap"
            " is called is another layer by now",
            where=config.arch,
            next_step="train the model anew, or cache its features anew",
        )


def build_pretrained(config: BackboneConfig) -> nn.Module:
    """The network as its named weights were published, with their classes, in eval mode.

    Raises ConfigError if the library has no such weights, and StoreUnavailable if they cannot be downloaded.
    """
    library, name = _locate(config.arch)
    try:
        # torch says on stdout, which is a job's result, that it downloads.
        with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(sys.stderr):
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


def with_published_outputs(config: BackboneConfig) -> BackboneConfig:
    """The config of which `build_network` makes what `build_pretrained` gives for it.

    Published weights may have another number of outputs than their architecture has by default.
    """
    library, name = _locate(config.arch)
    published = library.num_outputs(name, config.weights)
    built = config.num_classes
    if built is None:
        built = library.num_outputs(name, DEFAULT_WEIGHTS_NAME)
    return config if built == published else config.model_copy(update={"num_classes": published})


def default_preset(config: BackboneConfig) -> EvalPreset:
    """The preset of the config, else the one that its weights were trained with.

    Random weights take that of the architecture's default weights, files the one in which its published weights
    agree. Raises ConfigError where none is known or they do not agree, the named weights do not exist, no image would
    be large enough, or a preset does not say what of named weights is not as usual: their mean and deviation, for
    instance.
    """
    told, is_named = config.preset, weight_source(config) is WeightSource.NAMED
    if told is not None and (not is_named or told.model_fields_set == set(EvalPreset.model_fields)):
        preset = told
    else:
        library, name = _locate(config.arch)
        if told is None and weight_source(config) is WeightSource.URI:
            _refuse_unsure(library, name, config)
        preset = library.preset(name, config.weights if is_named else DEFAULT_WEIGHTS_NAME)
        if told is not None:
            _refuse_unsaid(told, preset)
            preset = told
    if preset.resize_px is not None and preset.resize_px < preset.crop_px:
        raise ConfigError(
            f"images are resized to {preset.resize_px} pixels, and {preset.crop_px} are to be cut out of them",
            where="backbone.preset",
            next_step="set resize_px to as many as crop_px or more",
        )
    return preset


def _refuse_unsure(library: NetworkLibrary, name: str, config: BackboneConfig) -> None:
    """ConfigError where the published weights of an architecture differ in their preset: which one is a file's?"""
    example_of: dict[EvalPreset, str] = {}
    for weights in library.weight_names(name):
        # Some of timm's are not cut but squashed, which no preset can say.
        with contextlib.suppress(ConfigError):
            example_of.setdefault(library.preset(name, weights), weights)
    if len(example_of) > 1:
        shown = [
            f"{json.dumps(preset.model_dump(mode='json'))} as {weights}"
            for preset, weights in example_of.items()
        ]
        raise ConfigError(
            f"the published weights of {config.arch} differ in how they want images, and a file does not say it",
            where=f"backbone.weights={config.weights}",
            next_step=f"set backbone.preset to what these weights were trained with: {', or '.join(shown)}",
        )


def _refuse_unsaid(told: EvalPreset, published: EvalPreset) -> None:
    """ConfigError where a preset leaves out what its weights want otherwise than usual: no digest could tell that."""
    unsaid = {
        name: value
        for name, value in published.model_dump(mode="json").items()
        if name not in told.model_fields_set and value != told.model_dump(mode="json")[name]
    }
    if unsaid:
        raise ConfigError(
            f"the preset leaves out {', '.join(unsaid)}, and these weights were not trained with the usual ones",
            where="backbone.preset",
            next_step="say them: the weights' own are "
            + ", ".join(f"{name}={json.dumps(value)}" for name, value in unsaid.items()),
        )


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
    return library.input_px(name)


def _locate(arch: str) -> tuple[NetworkLibrary, str]:
    """The library of an architecture, and its name there."""
    libraries: tuple[NetworkLibrary, ...] = (Torchvision(), Timm(), Classics())
    for library in libraries:
        name = arch.removeprefix(library.prefix)
        if arch.startswith(library.prefix) and name in library.names():
            return library, name
    if is_factory(arch):
        return Factories(), arch
    name, _, tag = arch.removeprefix(Timm.prefix).partition(".")
    if tag and name in Timm().names():
        next_step = f"write timm's tag into the weights: arch {Timm.prefix}{name}, weights {tag}"
    else:
        next_step = f"choose one of {', '.join(_nearest(arch, libraries))}"
    raise ConfigError(f"there is no architecture '{arch}'", where="backbone.arch", next_step=next_step)


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
