"""The registry of models: which version of a name is the candidate, the champion, and the champion before.

    models/<name>/aliases.json

The versions are the immutable bundles (see `bundles`). All aliases of a name and the whole history of their moves
are one object that is replaced by compare-and-swap: so a reader or a kill finds the state before a move or the one
after it, never one between, and of two who move at once the second decides anew by what the first left.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator

from convoy.core.config import StrictModel
from convoy.core.crash_points import CrashPoint, crash_point
from convoy.core.errors import ConditionalWriteUnsupported, DataError, ObjectNotFound, PreconditionFailed
from convoy.core.fingerprints import canonical_json
from convoy.storage.object_store import ONE_WRITER_ADVICE, ObjectStore, WriterMode, put_in_place_of

ALIASES_FORMAT_VERSION = 1
# A move that loses so many races in a row is stopped, with its error.
_MOST_RACES = 20


class Alias(StrEnum):
    """The names that versions of a model go by."""

    CANDIDATE = "candidate"  # trained last, whether or not it is good enough
    CHAMPION = "champion"  # the one that jobs use
    PREVIOUS = "previous"  # the champion before, to roll back to


ALIASES = frozenset(alias.value for alias in Alias)


class AliasMove(StrictModel):
    """A move of some aliases, each to a digest, or to none. `run` names what moved them, or is empty for a person."""

    action: str
    moves: dict[Alias, str | None]
    run: str = ""
    reason: str
    evidence: dict[str, Any] = Field(default_factory=dict)


class HistoryEntry(AliasMove):
    """A move that was made: `revision` counts from 1 without gaps, `at_utc` is the mover's clock, for people.

    `writer` is new for every attempt; a refused write tells its own earlier attempt from another's by it.
    """

    revision: int
    at_utc: str
    writer: str


class AliasRecord(StrictModel):
    """`aliases.json`: the aliases as they stand, and all moves that led there, oldest first."""

    format_version: int = ALIASES_FORMAT_VERSION
    revision: int = 0
    aliases: dict[Alias, str] = Field(default_factory=dict)
    history: tuple[HistoryEntry, ...] = ()

    @model_validator(mode="after")
    def _history_leads_here(self) -> Self:
        revisions = [entry.revision for entry in self.history]
        if revisions != list(range(1, self.revision + 1)):
            raise ValueError("the history has a gap")
        aliases: dict[Alias, str] = {}
        for entry in self.history:
            aliases = _moved(aliases, entry)
        if aliases != self.aliases:
            raise ValueError("the aliases are not those that the history leads to")
        return self

    def after(self, move: AliasMove) -> AliasRecord:
        """The record once this move is made."""
        entry = HistoryEntry(
            **move.model_dump(),
            revision=self.revision + 1,
            at_utc=datetime.now(UTC).isoformat(timespec="seconds"),
            writer=secrets.token_hex(8),
        )
        return AliasRecord(
            revision=entry.revision,
            aliases=_moved(self.aliases, entry),
            history=(*self.history, entry),
        )

    def move_by(self, run: str) -> HistoryEntry | None:
        """The last move that a run made, or None."""
        return next((entry for entry in reversed(self.history) if entry.run == run), None)

    def last_champion_move(self) -> HistoryEntry | None:
        """The move that made the champion the one that it is, or None."""
        return next((entry for entry in reversed(self.history) if Alias.CHAMPION in entry.moves), None)

    def aliases_of(self, digest: str) -> list[str]:
        """The aliases that a version goes by, sorted."""
        return sorted(alias.value for alias, held in self.aliases.items() if held == digest)


# Says what to move, given what stands; None moves nothing. It may be asked again.
AliasDecision = Callable[[AliasRecord], AliasMove | None]


def read_aliases(store: ObjectStore, name: str) -> AliasRecord:
    """The aliases of a model; empty where none was ever set. DataError for a document that contradicts itself."""
    return _read(store, name)[0]


def aliased_digest(store: ObjectStore, name: str, alias: str) -> str:
    """The digest that an alias of a model names; DataError where it names none."""
    digest = read_aliases(store, name).aliases.get(Alias(alias))
    if digest is None:
        raise DataError(
            f"model '{name}' has no {alias}",
            where=store.uri(_key(name)),
            next_step=f"name a version of `convoy models list`: convoy models promote {name} --digest DIGEST --reason"
            " ...; candidates are what `convoy retrain` makes",
        )
    return digest


def move_aliases(
    store: ObjectStore, name: str, decide: AliasDecision, *, writers: WriterMode = WriterMode.MANY
) -> AliasRecord:
    """Move aliases as `decide` says, by compare-and-swap; returns the record that stands then.

    Raises PreconditionFailed after losing many races in a row, ConditionalWriteUnsupported where the store has no
    compare-and-swap and others may move aliases too. That the digests exist is for `decide` to know.
    """
    for _ in range(_MOST_RACES):
        record, etag = _read(store, name)
        move = decide(record)
        if move is None:
            return record
        following = record.after(move)
        crash_point(CrashPoint.ALIASES_CHOSEN)
        try:
            _write(store, name, following, etag, writers)
        except PreconditionFailed:
            continue
        crash_point(CrashPoint.ALIASES_MOVED)
        return following
    raise PreconditionFailed(
        "others kept moving the aliases of this model",
        where=store.uri(_key(name)),
        next_step="run the same command again",
    )


def _moved(aliases: dict[Alias, str], move: AliasMove) -> dict[Alias, str]:
    wanted = {**aliases, **move.moves}
    return {alias: digest for alias, digest in wanted.items() if digest is not None}


def _read(store: ObjectStore, name: str) -> tuple[AliasRecord, str | None]:
    """The record and its etag, which is None where there is no record yet."""
    try:
        blob = store.get(_key(name))
        return AliasRecord.model_validate_json(blob.data), blob.etag
    except ObjectNotFound:
        return AliasRecord(), None
    except ValidationError as error:
        raise DataError(
            f"the aliases cannot be read: {error.errors()[0]['msg']}",
            where=store.uri(_key(name)),
            next_step="restore this object from a former version of it, or upgrade Convoy",
        ) from None


def _write(store: ObjectStore, name: str, record: AliasRecord, etag: str | None, writers: WriterMode) -> None:
    key, data = _key(name), canonical_json(record)
    try:
        put_in_place_of(store, key, data, etag)
    except ConditionalWriteUnsupported:
        if writers is WriterMode.MANY:
            raise ConditionalWriteUnsupported(
                "this store cannot replace an object on a condition, so two could move aliases at once",
                where=store.uri(key),
                next_step=ONE_WRITER_ADVICE,
            ) from None
        store.put(key, data)


def _key(name: str) -> str:
    return f"models/{name}/aliases.json"
