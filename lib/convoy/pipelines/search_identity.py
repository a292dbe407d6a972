"""Which search a config means: what of it must stay, so that a search which was cut off or has ended is found again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from convoy.core.fingerprints import canonical_json
from convoy.pipelines.network_training import NOT_IDENTITY
from convoy.pipelines.tune_config import TuneConfig
from convoy.pipelines.tune_plan import code_digests
from convoy.storage.manifests import Manifest
from convoy.storage.runs import RunRecord

# What may change between a kill and the next call: where, how fast and how long, and what is built of the trials; not
# what is searched.
_NOT_IDENTITY = dict.fromkeys(("workspace", "writers", "budget", "max_concurrent", "ensemble"), True)
# Nor of `base` what no training is told by. But trials keep their verdict on the error budget, so that counts.
_NOT_IDENTITY_OF_BASE = {key: value for key, value in NOT_IDENTITY.items() if key != "error_budget"}


def search_identity(manifest: Manifest, config: TuneConfig) -> dict[str, Any]:
    """What a search must share with the one that it goes on with."""
    code = code_digests(config)
    return _counted(
        {
            "dataset_fingerprint": manifest.fingerprint,
            "config": config.model_dump(mode="json", exclude=_NOT_IDENTITY),
            **({"code_digests": code} if code else {}),
        }
    )


def as_recorded(identity: dict[str, Any], record: RunRecord | None) -> dict[str, Any]:
    """The identity as the record of its run has it, which may be from when more of `base` counted."""
    if record is None or _counted(record.identity) != json.loads(canonical_json(identity)):
        return identity
    return record.identity


def _counted(identity: dict[str, Any]) -> dict[str, Any]:
    config = identity["config"]
    return {**identity, "config": {**config, "base": _without(_NOT_IDENTITY_OF_BASE, config["base"])}}


def _without(left_out: Mapping[str, Any], section: Mapping[str, Any]) -> dict[str, Any]:
    """The section without these keys; a section in it of which nothing stays is none."""
    kept: dict[str, Any] = {}
    for key, value in section.items():
        inner = left_out.get(key)
        if isinstance(inner, Mapping) and isinstance(value, Mapping):
            if rest := _without(inner, value):
                kept[key] = rest
        elif inner is not True:
            kept[key] = value
    return kept
