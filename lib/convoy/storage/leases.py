"""Leases: one driver a run, and a number that tells a later driver from an earlier one.

A driver holds `runs/<run>/lease.json` and renews it as long as it lives. Clocks of machines are never compared:
who finds a lease held watches it by its own clock, and takes it over, under the next token, if it was not renewed
for its time to live. A holder that ended on this very machine need not be watched. A holder that could not renew
for that time asks the store before it goes on. Leases save double work and stop the one who is not meant to work
any more; that a run is published once does not hang on them (see `commits`).
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from convoy.core.config import StrictModel
from convoy.core.errors import (
    ConvoyError,
    DataError,
    LeaseHeld,
    LeaseLost,
    ObjectNotFound,
    PreconditionFailed,
    RunCancelled,
    StorageError,
)
from convoy.core.fingerprints import canonical_json
from convoy.core.processes import ProcessIdentity, has_ended, this_process
from convoy.storage.documents import exists, parse_model
from convoy.storage.object_store import put_looking_first
from convoy.storage.runs import OpenRun, RunFolder, RunRecord, close_pointer

TTL_S = 30.0
LEASE = "lease.json"
GIVEN_UP = "given_up.json"
_RENEWALS_A_TTL = 3
# How often a lease, or a sign to stop, is looked for.
_LOOKS_A_TTL = 30
_RELEASE_PATIENCE_S = 5.0

_log = logging.getLogger(__name__)


class WhenHeld(StrEnum):
    """What a driver does that finds a living one at work: what a command is about refuses, what it needs waits."""

    REFUSE = "refuse"
    WAIT = "wait"


class LeaseRecord(StrictModel):
    """`lease.json`. `token` grows with each holder; `holder` is null while nobody holds the run.

    `since_utc` is the holder's clock, for people. `lease_id` is new for every time that a lease is taken.
    """

    lease_id: str
    token: int
    holder: ProcessIdentity | None
    since_utc: str
    renewals: int
    ttl_s: float

    @property
    def at_work(self) -> str | None:
        """Who holds the run and since when, or None; also None for a holder that is known here to have ended."""
        if self.holder is None or has_ended(self.holder):
            return None
        return f"{self.holder} since {self.since_utc}"


@dataclass(frozen=True, slots=True)
class _Seen:
    record: LeaseRecord
    etag: str


class RunLease:
    """A lease that is held, and renewed by a thread of its own."""

    def __init__(self, folder: RunFolder, seen: _Seen, renewed_s: float) -> None:
        self._folder = folder
        self._seen = seen
        self._renewed_s = self._looked_s = renewed_s
        self._is_lost = False
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name=f"lease of {folder.run_id}", daemon=True)

    @property
    def token(self) -> int:
        """The fencing number: greater than that of every holder before."""
        return self._seen.record.token

    def check(self) -> None:
        """Raise LeaseLost if another driver has the run, RunCancelled if it was given up.

        Cheap enough for every slice: the store is asked once in a while, and whenever a renewal is overdue.
        """
        now_s, ttl_s = time.monotonic(), self._seen.record.ttl_s
        if self._is_lost or now_s - self._renewed_s > ttl_s:
            self.confirm()
        elif now_s - self._looked_s > ttl_s / _LOOKS_A_TTL:
            self._looked_s = now_s
            _refuse_given_up(self._folder)

    def confirm(self) -> None:
        """The same by the store's own word; before what only the holder may do."""
        _refuse_given_up(self._folder)
        with self._lock:
            self._renew()

    def start(self) -> None:
        """Begin to renew."""
        self._thread.start()

    def release(self, *, forget: bool = False) -> None:
        """End renewing, and free the run; a lease that cannot be freed now is not renewed any more.

        That of a run to `forget` is deleted.
        """
        self._stop.set()
        self._thread.join(_RELEASE_PATIENCE_S)
        if self._is_lost or self._thread.is_alive():
            return
        with suppress(StorageError):
            if forget:
                self._folder.store.delete([self._folder.key(LEASE)])
            else:
                _write(self._folder, self._following(holder=None), self._seen.etag)

    def _keep(self) -> None:
        while not self._stop.wait(self._seen.record.ttl_s / _RENEWALS_A_TTL):
            try:
                with self._lock:
                    self._renew()
            except LeaseLost:
                self._is_lost = True
                return
            except StorageError as error:
                _log.warning("the lease of run %s could not be renewed: %s", self._folder.run_id, error.what)

    def _renew(self) -> None:
        asked_s = time.monotonic()
        following = self._following(holder=self._seen.record.holder)
        try:
            seen = _Seen(following, _write(self._folder, following, self._seen.etag))
        except PreconditionFailed:
            found = _read(self._folder)
            # Ours after all if the answer to an earlier renewal was lost.
            if found is None or found.record.lease_id != self._seen.record.lease_id:
                raise _lost(self._folder, found) from None
            seen = found
        self._seen, self._renewed_s = seen, asked_s

    def _following(self, *, holder: ProcessIdentity | None) -> LeaseRecord:
        before = self._seen.record
        return before.model_copy(update={"holder": holder, "renewals": before.renewals + 1})


@contextmanager
def hold_run(
    folder: RunFolder, *, ttl_s: float = TTL_S, when_held: WhenHeld = WhenHeld.REFUSE
) -> Iterator[RunLease]:
    """Be the only driver of a run, until the block ends.

    Raises LeaseHeld, naming the holder, if a living driver has it and is not to be waited for; that takes a third of
    its time to live, and taking over one that died elsewhere the whole. RunCancelled for a run that was given up.

    A run whose block is refused before anything was written into it is forgotten: no list shows it.
    """
    lease = _acquire(folder, ttl_s, when_held)
    forget = False
    try:
        lease.start()
        yield lease
    except ConvoyError:
        forget = _was_forgotten(folder, lease)
        raise
    finally:
        lease.release(forget=forget)


def take_up(
    open_run: OpenRun,
    identity: dict[str, Any],
    *,
    new_run: bool,
    when_held: WhenHeld = WhenHeld.REFUSE,
) -> tuple[RunFolder | None, RunRecord | None]:
    """What `OpenRun.resume` gives; but a run that a living driver holds is not left behind: what it does is new, too.

    LeaseHeld is raised, naming the holder, or its run joined, to wait for it: it would go on anyway, and no command
    could end its run if it died. A held lease is watched for that, for at most its time to live.
    """
    left = open_run.unfinished() if open_run.begins_anew(new_run) else None
    if left is not None and living_holders([left]) and (lease := read_lease(left)) is not None:
        if when_held is WhenHeld.REFUSE:
            raise _held(left, lease)
        new_run = False
    return open_run.resume(identity, new_run=new_run)


def read_lease(folder: RunFolder) -> LeaseRecord | None:
    """The lease of a run as it stands, or None if nobody ever held it."""
    seen = _read(folder)
    return None if seen is None else seen.record


def living_holders(folders: Sequence[RunFolder]) -> set[str]:
    """The ids of those runs that a driver is renewing. Watches held leases, all at once, for their time to live."""
    before = {folder.run_id: seen for folder in folders if (seen := _read(folder)) and seen.record.at_work}
    if not before:
        return set()
    time.sleep(max(seen.record.ttl_s for seen in before.values()))
    return {folder.run_id for folder in folders if _is_renewed(folder, before.get(folder.run_id))}


def give_up(folder: RunFolder) -> None:
    """Mark a run as given up: no driver takes it any more, and the one that has it stops at its next slice."""
    folder.store.put(folder.key(GIVEN_UP), canonical_json({"since_utc": _now_utc()}))


def is_given_up(folder: RunFolder) -> bool:
    """Whether a run was given up."""
    return exists(folder.store, folder.key(GIVEN_UP))


def _was_forgotten(folder: RunFolder, lease: RunLease) -> bool:
    """Whether a run that holds nothing but its lease could be forgotten: its pointer names it no more."""
    try:
        if not folder.open_key or any(
            info.key != folder.key(LEASE) for info in folder.store.list_objects(folder.prefix)
        ):
            return False
        lease.confirm()
        close_pointer(folder.store, folder.open_key, folder.run_id)
    except ConvoyError:
        # The run stays open; what is told is why its block ended.
        return False
    return True


class _Watch:
    """How long a lease has looked the same, by the clock of this machine."""

    def __init__(self, folder: RunFolder, when_held: WhenHeld) -> None:
        self._folder, self._when_held = folder, when_held
        self._etag = ""
        self._since_s = 0.0

    def is_stale(self, seen: _Seen) -> bool:
        """Whether a held lease was not renewed for its time to live; LeaseHeld if it was, and must not be."""
        now_s = time.monotonic()
        if seen.etag == self._etag:
            return now_s - self._since_s > seen.record.ttl_s
        if not self._etag:
            _log.warning(
                "run %s is held by %s: watching for at most %.0f s whether that is still at work",
                self._folder.run_id,
                seen.record.at_work,
                seen.record.ttl_s,
            )
        elif self._when_held is WhenHeld.REFUSE:
            raise _held(self._folder, seen.record)
        self._etag, self._since_s = seen.etag, now_s
        return False


def _acquire(folder: RunFolder, ttl_s: float, when_held: WhenHeld) -> RunLease:
    watch = _Watch(folder, when_held)
    while True:
        _refuse_given_up(folder)
        seen = _read(folder)
        if seen is None or seen.record.at_work is None or watch.is_stale(seen):
            lease = _take(folder, seen, ttl_s)
            if lease is not None:
                return lease
        else:
            time.sleep(seen.record.ttl_s / _LOOKS_A_TTL)


def _take(folder: RunFolder, seen: _Seen | None, ttl_s: float) -> RunLease | None:
    """The lease under the next token, or None if another driver was first."""
    record = LeaseRecord(
        lease_id=secrets.token_hex(8),
        token=1 if seen is None else seen.record.token + 1,
        holder=this_process(),
        since_utc=_now_utc(),
        renewals=0,
        ttl_s=ttl_s,
    )
    asked_s = time.monotonic()
    try:
        etag = _write(folder, record, None if seen is None else seen.etag)
    except PreconditionFailed:
        return None
    return RunLease(folder, _Seen(record, etag), asked_s)


def _read(folder: RunFolder) -> _Seen | None:
    try:
        blob = folder.store.get(folder.key(LEASE))
    except ObjectNotFound:
        return None
    where = folder.store.uri(folder.key(LEASE))
    try:
        return _Seen(parse_model(LeaseRecord, blob.data, where=where), blob.etag)
    except DataError as error:
        raise DataError(
            error.what,
            where=where,
            next_step="upgrade Convoy if a newer one wrote it; or else make sure that no driver is at work on the run,"
            " and delete it",
        ) from error


def _write(folder: RunFolder, record: LeaseRecord, replaced_etag: str | None) -> str:
    """Write a lease in the place of a version, or of none; its etag. PreconditionFailed if another is there."""
    key, data = folder.key(LEASE), canonical_json(record)
    return put_looking_first(folder.store, key, data, replaced_etag=replaced_etag)


def _is_renewed(folder: RunFolder, before: _Seen | None) -> bool:
    if before is None:
        return False
    seen = _read(folder)
    return seen is not None and seen.etag != before.etag and seen.record.at_work is not None


def _refuse_given_up(folder: RunFolder) -> None:
    # A run that was published while it was given up is finished all the same.
    if is_given_up(folder) and not folder.is_finished():
        raise RunCancelled(
            "the run was given up",
            where=folder.prefix,
            next_step="the same command starts a new one; `convoy runs gc` removes the files of this one",
        )


def _held(folder: RunFolder, record: LeaseRecord) -> LeaseHeld:
    run_id = folder.run_id
    return LeaseHeld(
        f"another driver works on this run: {record.at_work}",
        where=folder.prefix,
        next_step=f"wait for it (`convoy runs show {run_id}`), or stop it, there or with `convoy runs cancel {run_id}`,"
        " and run the same command again",
        holder=None if record.holder is None else record.holder.model_dump(),
        token=record.token,
    )


def _lost(folder: RunFolder, found: _Seen | None) -> LeaseLost:
    taker = "nobody any more" if found is None else found.record.at_work or "a driver that has ended"
    return LeaseLost(
        f"this driver could not renew its lease in time, and the run is held by {taker}",
        where=folder.prefix,
        next_step="nothing is lost; run the same command again if that driver does not finish the run",
    )


def _now_utc() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
