"""`convoy models fetch`: bring a weight set into the workspace once; workers only read the workspace.

Weights are stored by content, `models/backbones/<weights digest>/model.safetensors`. What was asked for is
remembered beside them, so that the next job finds its network without loading a single tensor.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from convoy.core.config import StrictModel
from convoy.core.errors import ConfigError
from convoy.core.fingerprints import canonical_json, digest
from convoy.storage.object_store import ObjectStore
from convoy.storage.runs import exists, read_json
from convoy.storage.stores import open_object
from convoy.vision.backbones import (
    BackboneConfig,
    WeightSource,
    build_network,
    build_pretrained,
    default_preset,
    native_px,
    pretrained_classes,
    weight_source,
)
from convoy.vision.depth_axis import DepthAxis, count_macs, derive_depth_axis, resolve_tap
from convoy.vision.presets import EvalPreset
from convoy.vision.weights import load_weights, read_state_dict, state_to_safetensors, weights_digest

_FOLDER = "models/backbones/"
_RECORD_VERSION = 1


class BackboneRecord(StrictModel):
    """A network in the workspace: what it is, where its weights lie, its depth axis, and what it expects.

    `macs` are multiply-adds for one image at the preset's size. `classes` are known for some weights only.
    """

    config: BackboneConfig
    arch: str
    weights_digest: str
    weights_key: str
    preset: EvalPreset
    num_classes: int
    classes: tuple[str, ...] | None
    num_parameters: int
    macs: int
    axis: DepthAxis

    def resolve_tap(self, tap: str | int) -> str:
        """The full name of a stage given by name, alias, prefix or number."""
        return resolve_tap(self.axis, tap).name


def fetch_backbone(store: ObjectStore, config: BackboneConfig) -> BackboneRecord:
    """The network of a config, brought into the workspace if it is not there yet.

    Raises ConfigError if the weights do not fit the architecture or are not those that `weights_digest` pins.
    """
    request_key = f"{_FOLDER}requests/{digest([_RECORD_VERSION, config, _source_version(config)])}.json"
    known = read_json(store, request_key)
    if known is not None:
        record = BackboneRecord.model_validate(known)
        if exists(store, record.weights_key):
            return record
    network, classes = _load(config)
    record = _describe(config, network, classes)
    if config.weights_digest not in (None, record.weights_digest):
        raise ConfigError(
            f"the weights have the digest {record.weights_digest}, not {config.weights_digest}",
            where=config.weights,
            next_step="someone replaced the weights: bring the old ones back, or change weights_digest",
        )
    restore_backbone(store, record, network.state_dict())
    store.put(request_key, canonical_json(record))
    return record


def restore_backbone(store: ObjectStore, record: BackboneRecord, state: Mapping[str, torch.Tensor]) -> None:
    """Put a network's weights where its record says, unless they are there."""
    if not exists(store, record.weights_key):
        store.put(record.weights_key, state_to_safetensors(state))


def read_backbone_state(store: ObjectStore, record: BackboneRecord) -> dict[str, torch.Tensor]:
    """The tensors of a network in the workspace."""
    return read_state_dict(store.get(record.weights_key).data)


def _source_version(config: BackboneConfig) -> str:
    """The etag of the weights' file, so that a replaced file is noticed; nothing for named and random weights."""
    if weight_source(config) is not WeightSource.URI:
        return ""
    store, key = open_object(config.weights)
    return store.head(key).etag


def _load(config: BackboneConfig) -> tuple[torch.nn.Module, tuple[str, ...] | None]:
    source = weight_source(config)
    if source is WeightSource.NAMED:
        return build_pretrained(config), pretrained_classes(config)
    network = build_network(config)
    if source is WeightSource.URI:
        store, key = open_object(config.weights)
        load_weights(network, read_state_dict(store.get(key).data))
    return network, None


def _describe(
    config: BackboneConfig, network: torch.nn.Module, classes: tuple[str, ...] | None
) -> BackboneRecord:
    preset = default_preset(config)
    axis = derive_depth_axis(network, input_px=native_px(config))
    found = weights_digest(network.state_dict())
    return BackboneRecord(
        config=config,
        arch=config.arch,
        weights_digest=found,
        weights_key=f"{_FOLDER}{found}/model.safetensors",
        preset=preset,
        num_classes=axis.stages[-1].channels,
        classes=classes,
        num_parameters=sum(parameter.numel() for parameter in network.parameters()),
        macs=count_macs(network, input_px=preset.crop_px),
        axis=axis,
    )
