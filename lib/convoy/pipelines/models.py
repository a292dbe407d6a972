"""`convoy models fetch`: bring a weight set into the workspace once; workers only read the workspace.

Weights are stored by content, `models/backbones/<weights digest>/model.safetensors`. What was asked for is
remembered beside them, so that the next job finds its network without importing torch.
"""

from __future__ import annotations

from convoy.core.fingerprints import canonical_json, digest
from convoy.pipelines.backbone_record import BACKBONES, BackboneRecord
from convoy.storage.documents import exists, read_json
from convoy.storage.object_store import ObjectStore
from convoy.storage.stores import open_object
from convoy.vision.backbone_config import BackboneConfig, WeightSource, weight_source
from convoy.vision.factories import with_pinned_code

_RECORD_VERSION = 2


def fetch_backbone(store: ObjectStore, config: BackboneConfig) -> BackboneRecord:
    """The network of a config, brought into the workspace if it is not there yet.

    Raises ConfigError if the weights do not fit the architecture or are not those that `weights_digest` pins, and
    VersionMismatch for a factory of other code than `code_digest` pins.
    """
    config = with_pinned_code(config)
    request_key = f"{BACKBONES}requests/{digest([_RECORD_VERSION, config, _source_version(config)])}.json"
    known = read_json(store, request_key)
    if known is not None:
        record = BackboneRecord.model_validate(known)
        if exists(store, record.weights_key):
            return record
    # Only a network that is new to the workspace has to be built and loaded.
    from convoy.pipelines.backbone_loading import load_backbone  # noqa: PLC0415

    record = load_backbone(store, config)
    store.put(request_key, canonical_json(record))
    return record


def _source_version(config: BackboneConfig) -> str:
    """The etag of the weights' file, so that a replaced file is noticed; nothing for named and random weights."""
    if weight_source(config) is not WeightSource.URI:
        return ""
    store, key = open_object(config.weights)
    return store.head(key).etag
