"""What the checkpoints of a run say of themselves."""

from __future__ import annotations

from contextlib import suppress

from pydantic import ValidationError

from convoy.core.errors import ObjectNotFound
from convoy.storage.checkpoints import CheckpointRecord
from convoy.storage.object_store import ObjectStore
from convoy.storage.runs import RunFolder


def checkpoint_records(store: ObjectStore, run_id: str) -> list[CheckpointRecord]:
    """The records that can be read, newest first: highest step first. Their bytes are not looked at."""
    found = store.list_objects(RunFolder(store, run_id).key("checkpoints/"))
    records = []
    for key in sorted((info.key for info in found if info.key.endswith(".json")), reverse=True):
        with suppress(ObjectNotFound, ValidationError):
            records.append(CheckpointRecord.model_validate_json(store.get(key).data))
    return records
