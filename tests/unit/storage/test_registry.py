"""The registry: aliases move by compare-and-swap, and their history has no gap."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from convoy.core.errors import ConditionalWriteUnsupported, ConfigError, DataError
from convoy.storage.bundles import BundleRef, open_bundle, resolve_bundle, write_bundle
from convoy.storage.local_store import LocalStore
from convoy.storage.object_store import WriterMode
from convoy.storage.registry import (
    Alias,
    AliasMove,
    AliasRecord,
    move_aliases,
    read_aliases,
)
from convoy.storage.stores import open_store

FILES = dict.fromkeys(("config.json", "preprocess.json", "classes.json", "metrics.json"), b"{}")


class WithoutCompareAndSwap(LocalStore):
    """A store like those that know no If-Match."""

    def put_if_match(self, key: str, data: bytes, *, etag: str) -> str:
        raise ConditionalWriteUnsupported("no If-Match here")


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    opened = open_store(str(tmp_path))
    assert isinstance(opened, LocalStore)
    return opened


def version_of(store: LocalStore, content: bytes) -> BundleRef:
    return write_bundle(store, "net", {**FILES, "README.md": b"# net\n", "model.safetensors": content})


def move(digest: str, *, run: str = "", reason: str = "better") -> AliasMove:
    return AliasMove(action="promoted", moves={Alias.CHAMPION: digest}, run=run, reason=reason)


def test_an_alias_opens_the_version_that_it_names(store: LocalStore) -> None:
    first, second = version_of(store, b"one"), version_of(store, b"two")
    move_aliases(store, "net", lambda _: move(first.digest))

    assert resolve_bundle(store, "net") == second
    assert resolve_bundle(store, "net@champion") == first
    assert open_bundle(store, "net@champion").files["model.safetensors"] == b"one"
    with pytest.raises(DataError, match="has no candidate") as caught:
        resolve_bundle(store, "net@candidate")
    assert "convoy models promote net --digest DIGEST" in caught.value.next_step
    with pytest.raises(ConfigError, match="no reference"):
        resolve_bundle(store, "net@best")


def test_two_writers_at_once_lose_no_move(store: LocalStore) -> None:
    def move_often(writer: int) -> None:
        for number in range(10):
            moved = move(f"{writer:016x}{number:016x}", reason=f"{writer}/{number}")
            move_aliases(store, "net", lambda _, moved=moved: moved)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(move_often, range(2)))

    record = read_aliases(store, "net")
    assert record.revision == 20
    assert [entry.revision for entry in record.history] == list(range(1, 21))
    by_writer = [
        [entry.reason for entry in record.history if entry.reason[0] == str(one)] for one in range(2)
    ]
    assert by_writer == [[f"{one}/{number}" for number in range(10)] for one in range(2)]


def test_who_loses_the_race_decides_anew_by_what_the_winner_left(store: LocalStore) -> None:
    seen: list[int] = []

    def decide(record: AliasRecord) -> AliasMove:
        seen.append(record.revision)
        if len(seen) == 1:
            move_aliases(store, "net", lambda _: move("a" * 32))
        return move("b" * 32)

    record = move_aliases(store, "net", decide)
    assert seen == [0, 1]
    assert record.aliases == {Alias.CHAMPION: "b" * 32}
    assert record.revision == 2


def test_nothing_moves_where_the_decision_is_none(store: LocalStore) -> None:
    assert move_aliases(store, "net", lambda _: None).revision == 0
    assert not list(store.list_objects("models/"))


def test_an_alias_can_be_taken_away(store: LocalStore) -> None:
    move_aliases(store, "net", lambda _: move("a" * 32))
    gone = AliasMove(action="removed", moves={Alias.CHAMPION: None}, reason="bad")
    assert move_aliases(store, "net", lambda _: gone).aliases == {}
    assert len(read_aliases(store, "net").history) == 2


@pytest.mark.parametrize("damage", ["history", "aliases"])
def test_a_record_that_contradicts_its_history_is_refused(store: LocalStore, damage: str) -> None:
    for digest in ("a" * 32, "b" * 32):
        move_aliases(store, "net", lambda _, digest=digest: move(digest))
    written = json.loads(store.get("models/net/aliases.json").data)
    written[damage] = written["history"][:1] if damage == "history" else {"champion": "c" * 32}
    store.put("models/net/aliases.json", json.dumps(written).encode())
    with pytest.raises(DataError, match="gap" if damage == "history" else "leads to"):
        read_aliases(store, "net")


def test_without_compare_and_swap_only_a_single_writer_may_move(tmp_path: Path) -> None:
    store = WithoutCompareAndSwap(str(tmp_path))
    move_aliases(store, "net", lambda _: move("a" * 32))
    with pytest.raises(ConditionalWriteUnsupported, match="two could move aliases at once"):
        move_aliases(store, "net", lambda _: move("b" * 32))
    record = move_aliases(store, "net", lambda _: move("b" * 32), writers=WriterMode.SINGLE)
    assert record.aliases == {Alias.CHAMPION: "b" * 32}


def test_a_run_finds_its_own_move_again(store: LocalStore) -> None:
    move_aliases(store, "net", lambda _: move("a" * 32, run="retrains/net/2026-01-01"))
    record = move_aliases(store, "net", lambda _: move("b" * 32))
    found = record.move_by("retrains/net/2026-01-01")
    assert found is not None
    assert found.moves == {Alias.CHAMPION: "a" * 32}
    assert record.move_by("retrains/net/2026-01-02") is None
