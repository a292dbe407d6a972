"""Small documents in a store, and whether they are there."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from convoy.core.errors import DataError, ObjectNotFound
from convoy.storage.object_store import ObjectStore

ModelT = TypeVar("ModelT", bound=BaseModel)


def read_json(store: ObjectStore, key: str) -> Any:
    """A JSON document, or None where it does not exist. DataError for one that is damaged, as by hand."""
    data = _read(store, key)
    return None if data is None else parse_json(data, where=store.uri(key))


def parse_json(data: bytes, *, where: str) -> Any:
    """The value of a JSON document. DataError for one that is damaged."""
    try:
        return json.loads(data)
    except ValueError as error:
        raise _damaged(str(error), where) from error


def read_model(model: type[ModelT], store: ObjectStore, key: str) -> ModelT | None:
    """A document as what it should be, or None where it does not exist. DataError as of `parse_model`."""
    data = _read(store, key)
    return None if data is None else parse_model(model, data, where=store.uri(key))


def parse_model(model: type[ModelT], data: bytes, *, where: str) -> ModelT:
    """The bytes of a document as what it should be. DataError for one that is damaged, or of another Convoy."""
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            raise _damaged(first["msg"], where) from error
        raise DataError(
            f"the document does not say what it should: {'.'.join(map(str, first['loc']))}: {first['msg']}",
            where=where,
            next_step="upgrade Convoy if a newer one wrote it, or restore it from a backup",
        ) from error


def exists(store: ObjectStore, key: str) -> bool:
    """Whether an object exists."""
    try:
        store.head(key)
    except ObjectNotFound:
        return False
    return True


def _read(store: ObjectStore, key: str) -> bytes | None:
    try:
        return store.get(key).data
    except ObjectNotFound:
        return None


def _damaged(how: str, where: str) -> DataError:
    return DataError(
        f"the document is damaged: {how}",
        where=where,
        next_step="restore it from a backup, or from a former version of the object where the bucket keeps them",
    )
