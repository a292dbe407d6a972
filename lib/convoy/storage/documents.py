"""Small documents in a store, and whether they are there."""

from __future__ import annotations

import json
from typing import Any

from convoy.core.errors import DataError, ObjectNotFound
from convoy.storage.object_store import ObjectStore


def read_json(store: ObjectStore, key: str) -> Any:
    """A JSON document, or None where it does not exist. DataError for one that is damaged, as by hand."""
    try:
        return json.loads(store.get(key).data)
    except ObjectNotFound:
        return None
    except ValueError as error:
        raise DataError(
            f"the document is damaged: {error}",
            where=store.uri(key),
            next_step="restore it from a backup, or from a former version of the object where the bucket keeps them",
        ) from error


def exists(store: ObjectStore, key: str) -> bool:
    """Whether an object exists."""
    try:
        store.head(key)
    except ObjectNotFound:
        return False
    return True
