from __future__ import annotations

import time
from pathlib import Path

import pytest

from convoy.core.errors import (
    AccessDenied,
    ConditionalWriteUnsupported,
    ObjectNotFound,
    PreconditionFailed,
)
from convoy.storage.conditional_put import probe_conditional_put
from convoy.storage.local_store import LocalStore
from convoy.storage.object_store import ConditionalPut


class ChecksThenWrites(LocalStore):
    """What a server without a lock does."""

    def put_if_absent(self, key: str, data: bytes) -> str:
        try:
            self.head(key)
        except ObjectNotFound:
            time.sleep(0.001)
            return self.put(key, data)
        raise PreconditionFailed("exists")


class IgnoresTheHeader(LocalStore):
    """What a server does that has never heard of If-None-Match."""

    def put_if_absent(self, key: str, data: bytes) -> str:
        return self.put(key, data)


class IgnoresVersions(LocalStore):
    """What a server does that keeps If-None-Match, and has never heard of If-Match."""

    def put_if_match(self, key: str, data: bytes, *, etag: str) -> str:
        return self.put(key, data)


class ReplacesNoVersions(LocalStore):
    def put_if_match(self, key: str, data: bytes, *, etag: str) -> str:
        raise ConditionalWriteUnsupported("no")


class SaysNo(LocalStore):
    def put_if_absent(self, key: str, data: bytes) -> str:
        raise ConditionalWriteUnsupported("no")


class Denies(LocalStore):
    def put_if_absent(self, key: str, data: bytes) -> str:
        raise AccessDenied("no")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (LocalStore, ConditionalPut.ATOMIC),
        (ChecksThenWrites, ConditionalPut.RACY),
        (IgnoresTheHeader, ConditionalPut.RACY),
        (IgnoresVersions, ConditionalPut.RACY),
        (ReplacesNoVersions, ConditionalPut.UNSUPPORTED),
        (SaysNo, ConditionalPut.UNSUPPORTED),
    ],
)
def test_a_store_is_judged_by_its_winners(
    kind: type[LocalStore], expected: ConditionalPut, tmp_path: Path
) -> None:
    store = kind(str(tmp_path))
    assert probe_conditional_put(store, num_rounds=4) is expected
    assert list(store.list_objects()) == []


def test_a_store_that_denies_is_not_judged(tmp_path: Path) -> None:
    with pytest.raises(AccessDenied):
        probe_conditional_put(Denies(str(tmp_path)), num_rounds=1)
