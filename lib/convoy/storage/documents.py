"""Small documents in a store, and whether they are there."""

from __future__ import annotations

import json
from typing import Any

from convoy.core.errors import ObjectNotFound
from convoy.storage.object_store import ObjectStore


def read_json(store: ObjectStore, key: str) -> Any:
    """A JSON document, or None where it does not exist."""
    try:
        return json.loads(store.get(key).data)
    except ObjectNotFound:
        return None


def exists(store: ObjectStore, key: str) -> bool:
    """Whether an object exists."""
    try:
        store.head(key)
    except ObjectNotFound:
        return False
    return True
