"""`convoy models fetch`: bring a weight set into the workspace once; workers only read the workspace.

Weights are stored by content, `models/backbones/<weights digest>/model.safetensors`. What was asked for is
remembered beside them, so that the next job finds its network without importing torch.
"""

from __future__ import annotations

from convoy.core.errors import ObjectNotFound
from convoy.core.fingerprints import canonical_json, digest
from convoy.pipelines.backbone_record import BACKBONES, BackboneRecord
from convoy.storage.bundles import MODEL_FILE
from convoy.storage.documents import exists, read_model
from convoy.storage.object_store import ObjectStore
from convoy.storage.stores import open_object
from convoy.vision.backbone_config import BackboneConfig, WeightSource, weight_source
from convoy.vision.factories import with_pinned_code

# Of a bundle's file, records of version 3 have the preset of the architecture in place of the bundle's.
_RECORD_VERSION, _BUNDLE_RECORD_VERSION = 3, 4
# Records of this version may be wrong where the outputs are neither those that were asked for nor ImageNet's classes.
_FORMER_VERSION, _USUAL_OUTPUTS = 2, 1000


def fetch_backbone(store: ObjectStore, config: BackboneConfig) -> BackboneRecord:
    """The network of a config, brought into the workspace if it is not there yet.

    Raises ConfigError if the weights do not fit the architecture or are not those that `weights_digest` pins,
    ObjectNotFound and DataError for a path where no file of weights is, and VersionMismatch for a factory of other code
    than `code_digest` pins.
    """
    config = with_pinned_code(config)
    source = _source_version(config)
    known = _known(store, config, source)
    if known is not None and exists(store, known.weights_key):
        return known
    # Only a network that is new to the workspace has to be built and loaded.
    from convoy.pipelines.backbone_loading import load_backbone  # noqa: PLC0415

    record = load_backbone(store, config)
    # Jobs that build upon this one ask for the record's config, which may tell more.
    for key in {_request_key(_version(asked), asked, source) for asked in (config, record.config)}:
        store.put(key, canonical_json(record))
    return record


def _known(store: ObjectStore, config: BackboneConfig, source: str) -> BackboneRecord | None:
    version = _version(config)
    known = read_model(BackboneRecord, store, _request_key(version, config, source))
    if known is not None:
        # Of some networks without classifier the last layer was once taken for one.
        is_right = known.config.num_classes != 0 or known.num_classes == 0
        return known if is_right and _knows_classes(known) else None
    if version == _BUNDLE_RECORD_VERSION:
        return None
    former = read_model(BackboneRecord, store, _request_key(_FORMER_VERSION, config, source))
    if former is None or former.num_classes != (config.num_classes or _USUAL_OUTPUTS):
        return None
    return former if _knows_classes(former) else None


def _knows_classes(record: BackboneRecord) -> bool:
    """Whether the file of its weights was asked for classes: before multiply-adds to taps were counted none was."""
    return bool(record.tap_macs) or weight_source(record.config) is not WeightSource.URI


def _version(config: BackboneConfig) -> int:
    """That of the record in which a config is looked for."""
    takes_preset = config.preset is None and config.weights.rpartition("/")[2] == MODEL_FILE
    return _BUNDLE_RECORD_VERSION if takes_preset else _RECORD_VERSION


def _request_key(version: int, config: BackboneConfig, source: str) -> str:
    return f"{BACKBONES}requests/{digest([version, config, source])}.json"


def _source_version(config: BackboneConfig) -> str:
    """The etag of the weights' file, so that a replaced file is noticed; nothing for named and random weights."""
    if weight_source(config) is not WeightSource.URI:
        return ""
    store, key = open_object(config.weights)
    try:
        return store.head(key).etag
    except ObjectNotFound as error:
        raise ObjectNotFound(
            error.what,
            where=error.where,
            next_step="name a file of weights in backbone.weights, such as the model.safetensors of a bundle",
        ) from None
