from __future__ import annotations

import shutil
from collections import namedtuple

import pytest

from convoy.cluster import session

Usage = namedtuple("Usage", "total used free")
SMALL_BYTES = 256 * 2**20


@pytest.mark.parametrize(
    ("num_gpus", "shared_gib", "expected"),
    [
        # Keys and records only.
        (0, 500, SMALL_BYTES),
        # Prepared batches: Ray's own size.
        (1, 500, None),
        (8, 12, None),
        # What Ray would put on a disk.
        (1, 8, int(0.9 * 8 * 2**30)),
        (1, 1 / 16, SMALL_BYTES),
    ],
)
def test_a_local_session_has_an_object_store_for_what_flows_through_it(
    monkeypatch: pytest.MonkeyPatch, num_gpus: int, shared_gib: float, expected: int | None
) -> None:
    monkeypatch.setattr(session, "_num_gpus", lambda: num_gpus)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, int(shared_gib * 2**30)))
    assert session._object_store_bytes() == expected


def test_a_machine_without_shared_memory_has_a_small_object_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_num_gpus", lambda: 1)
    monkeypatch.setattr(session, "_SHARED_MEMORY", "/no/such/folder")
    assert session._object_store_bytes() == SMALL_BYTES


def test_ray_says_how_many_gpus_it_will_find() -> None:
    assert session._num_gpus() >= 0
