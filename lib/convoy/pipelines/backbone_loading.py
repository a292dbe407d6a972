"""Networks and their tensors, into the workspace and out of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from convoy.core.config import parse_config
from convoy.core.errors import AccessDenied, ConfigError, DataError
from convoy.pipelines.backbone_record import BACKBONES, BackboneRecord
from convoy.storage.bundles import MODEL_FILE
from convoy.storage.documents import exists, read_json
from convoy.storage.object_store import ObjectStore
from convoy.storage.stores import open_object
from convoy.vision.backbone_config import BackboneConfig, WeightSource, weight_source
from convoy.vision.backbones import (
    build_network,
    build_pretrained,
    default_preset,
    depth_axis,
    pretrained_classes,
    with_published_outputs,
)
from convoy.vision.depth_axis import count_macs, count_tap_macs
from convoy.vision.presets import EvalPreset
from convoy.vision.weights import (
    adapt_published,
    load_weights,
    read_state_dict,
    require_digest,
    state_to_safetensors,
    weights_digest,
)


def load_backbone(store: ObjectStore, config: BackboneConfig) -> BackboneRecord:
    """Build a network, load its weights from where the config says, and put them into the workspace."""
    network, classes = _load(config)
    require_digest(network.state_dict(), config.weights_digest)
    if weight_source(config) is WeightSource.NAMED:
        config = with_published_outputs(config)
    return keep_network(store, config, network, preset=backbone_preset(config), classes=classes)


def backbone_preset(config: BackboneConfig) -> EvalPreset:
    """The preset of the config, that of the bundle whose file its weights are, or what `default_preset` says."""
    if config.preset is None and weight_source(config) is WeightSource.URI:
        store, key = open_object(config.weights)
        said = _beside_weights(store, key, "preprocess.json")
        if isinstance(said, dict) and "preset" in said:
            preset = parse_config(EvalPreset, said["preset"], where=store.uri("preprocess.json"))
            config = config.model_copy(update={"preset": preset})
    return default_preset(config)


def keep_network(
    store: ObjectStore,
    config: BackboneConfig,
    network: nn.Module,
    *,
    preset: EvalPreset,
    classes: tuple[str, ...] | None,
) -> BackboneRecord:
    """Put a network's weights into the workspace, by their content, and return its record."""
    axis = depth_axis(config, network)
    found = weights_digest(network.state_dict())
    record = BackboneRecord(
        config=config,
        arch=config.arch,
        weights_digest=found,
        weights_key=f"{BACKBONES}{found}/model.safetensors",
        preset=preset,
        num_classes=axis.num_classes,
        classes=classes,
        num_parameters=sum(parameter.numel() for parameter in network.parameters()),
        macs=count_macs(network, input_px=preset.crop_px),
        tap_macs=count_tap_macs(network, axis, input_px=preset.crop_px),
        axis=axis,
    )
    restore_backbone(store, record, network.state_dict())
    return record


def restore_backbone(store: ObjectStore, record: BackboneRecord, state: Mapping[str, torch.Tensor]) -> None:
    """Put a network's weights where its record says, unless they are there."""
    if not exists(store, record.weights_key):
        store.put(record.weights_key, state_to_safetensors(state))


def read_backbone_state(store: ObjectStore, record: BackboneRecord) -> dict[str, torch.Tensor]:
    """The tensors of a network in the workspace."""
    return read_state_dict(store.get(record.weights_key).data)


def _load(config: BackboneConfig) -> tuple[nn.Module, tuple[str, ...] | None]:
    source = weight_source(config)
    if source is WeightSource.TRAINED:
        raise ConfigError(
            "the weights of a trained network lie in its bundle",
            where="backbone.weights",
            next_step="name the URI of the bundle's model.safetensors",
        )
    if source is WeightSource.NAMED:
        return build_pretrained(config), pretrained_classes(config)
    network = build_network(config)
    if source is not WeightSource.URI:
        return network, None
    store, key = open_object(config.weights)
    state = read_state_dict(store.get(key).data, where=store.uri(key))
    load_weights(network, adapt_published(state, network))
    return network, _classes_of_bundle(store, key)


def _classes_of_bundle(store: ObjectStore, key: str) -> tuple[str, ...] | None:
    """The classes that a network of a bundle has an output for each of; None for files of no bundle."""
    classes, config = (_beside_weights(store, key, name) for name in ("classes.json", "config.json"))
    is_bundled = isinstance(classes, list) and isinstance(config, dict) and "output_groups" not in config
    return tuple(classes) if is_bundled else None


def _beside_weights(store: ObjectStore, key: str, name: str) -> Any:
    """A document of the bundle that a file of weights is of; None of what is no bundle's."""
    if key != MODEL_FILE:
        return None
    try:
        return read_json(store, name)
    except (AccessDenied, DataError):
        # Whatever lies there, or may not be looked for, is none of a bundle's.
        return None
