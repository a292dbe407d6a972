"""Runs: what was asked, on which frozen input, and which unfinished run the same command goes on with."""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import pyarrow as pa
from pydantic import Field

from convoy.core.code_revision import current_versions
from convoy.core.config import StrictModel
from convoy.core.crash_points import CrashPoint, crash_point
from convoy.core.differences import describe_changes, differences
from convoy.core.errors import ConfigError, DataError, ObjectNotFound, PreconditionFailed, RunMismatch
from convoy.core.fingerprints import canonical_json, digest
from convoy.storage.documents import exists, parse_json, parse_model, read_json, read_model
from convoy.storage.object_store import ObjectStore, put_looking_first

SLICES_PER_INPUT_SHARD = 64
# Where the frozen input of a run lies in its folder.
INPUT = "input/"

_log = logging.getLogger(__name__)


class SliceGroup(StrictModel):
    """Slices that need the same outputs: `outputs` are the ids of the sets that each slice writes a part for.

    `attempt` names the freezing that wrote their input; it is empty in runs of before freezings had names, which do not
    tell the rows of a whole slice either.
    """

    outputs: tuple[str, ...]
    num_rows: int
    num_slices: int
    attempt: str = ""
    slice_rows: int = 0

    def rows_of(self, number: int) -> int:
        """Rows of a slice: of all but the last one the same."""
        whole = self.slice_rows or -(-self.num_rows // self.num_slices)
        return min(whole, max(self.num_rows - number * whole, 0))

    @property
    def num_shards(self) -> int:
        """Files that hold the input of the slices."""
        return -(-self.num_slices // SLICES_PER_INPUT_SHARD) if self.num_rows else 0


class RunRecord(StrictModel):
    """`run.json`: written once, after the input is frozen and before any work is done.

    `identity` is everything that determines the results; a resumed run must have an equal one. `config` is the
    resolved config as the user would write it. `outputs` maps the id of each output to the prefix of its parts.
    `open_key` is where the pointer to the run lies while it is unfinished, by which it can be opened again.
    """

    run_id: str
    verb: str
    identity: dict[str, Any]
    config: dict[str, Any]
    versions: dict[str, str]
    created_utc: str
    outputs: dict[str, str]
    groups: tuple[SliceGroup, ...]
    settings: dict[str, Any] = Field(default_factory=dict)
    open_key: str = ""

    @classmethod
    def new(cls, run_id: str, **fields: Any) -> RunRecord:
        """A record of a run that begins now, with the versions of what computes it."""
        return cls(
            run_id=run_id,
            created_utc=datetime.now(UTC).isoformat(timespec="seconds"),
            versions=current_versions(),
            **fields,
        )

    @property
    def num_slices(self) -> int:
        """Slices of the frozen input."""
        return sum(group.num_slices for group in self.groups)

    @property
    def num_inputs(self) -> int:
        """Rows of the frozen input."""
        return sum(group.num_rows for group in self.groups)

    def slice_names(self) -> Iterator[str]:
        """The names of all slices, `<group>-<number>`, in input order."""
        for index, group in enumerate(self.groups):
            for number in range(group.num_slices):
                yield slice_name(index, number)

    def slice_names_by_size(self) -> list[str]:
        """The same, largest first: what is started last is what the others wait for. Equal ones in input order."""
        return sorted(self.slice_names(), key=self.rows_of, reverse=True)

    def rows_of(self, name: str) -> int:
        """The rows of a slice."""
        group, number = parse_slice_name(name)
        return self.groups[group].rows_of(number)

    def outputs_of(self, name: str) -> tuple[str, ...]:
        """The ids of the sets that a slice writes."""
        return self.groups[parse_slice_name(name)[0]].outputs


def slice_name(group: int, number: int) -> str:
    """The fixed name of a slice."""
    return f"{group}-{number:06d}"


FIRST_SLICE = slice_name(0, 0)


def parse_slice_name(name: str) -> tuple[int, int]:
    """The (group, number) of a slice name."""
    group, _, number = name.partition("-")
    return int(group), int(number)


class RunFolder:
    """The keys of one run below a workspace, and its small documents. Known as open by the pointer at `open_key`."""

    def __init__(self, store: ObjectStore, run_id: str, *, open_key: str = "") -> None:
        self.store = store
        self.run_id = run_id
        self.open_key = open_key
        self.prefix = f"runs/{run_id}/"

    def key(self, name: str) -> str:
        """The key of a file of the run."""
        return self.prefix + name

    def input_key(self, group: int, shard: int, attempt: str) -> str:
        """The key of one shard of the input that an attempt to freeze it wrote."""
        folder = f"{INPUT}{attempt}/" if attempt else INPUT
        return self.key(f"{folder}{group}-{shard:05d}.parquet")

    def record(self) -> RunRecord | None:
        """The run record, or None if the run died before it was written. DataError where it cannot be understood."""
        return read_model(RunRecord, self.store, self.key("run.json"))

    def write_record(self, record: RunRecord) -> RunRecord:
        """Write `run.json`; from here on the run can be resumed. The record that counts: another's that was first."""
        record = record.model_copy(update={"open_key": self.open_key})
        try:
            put_looking_first(self.store, self.key("run.json"), canonical_json(record))
        except PreconditionFailed:
            written = self.record()
            if written is None:
                raise
            record = written
        crash_point(CrashPoint.RUN_RECORDED)
        return record

    @cached_property
    def _groups(self) -> tuple[SliceGroup, ...]:
        key = self.key("run.json")
        return parse_model(RunRecord, self.store.get(key).data, where=self.store.uri(key)).groups

    def is_finished(self) -> bool:
        """Whether the run was committed to the last step."""
        return exists(self.store, self.key("_SUCCESS"))

    def report(self) -> dict[str, Any] | None:
        """What the finished run reported; None as long as it is not finished."""
        return read_json(self.store, self.key("report.json")) if self.is_finished() else None

    def read_slice(self, name: str) -> pa.Table:
        """The frozen input rows of a slice: columns of the manifest. DataError if they are damaged."""
        group, number = parse_slice_name(name)
        shard, row_group = divmod(number, SLICES_PER_INPUT_SHARD)
        key = self.input_key(group, shard, self._groups[group].attempt)
        damage: Exception | None = None
        # Of a large shard only ranges are read, and compared by the checksums of its pages: so here, once more.
        for _attempt in range(2):
            try:
                return self.store.open_parquet(key).read_row_group(row_group)
            except (OSError, pa.ArrowInvalid, DataError) as error:
                damage = error
        raise DataError(
            f"the frozen input of slice {name} is damaged: {damage}",
            where=self.store.uri(key),
            next_step="leave this run and start afresh with --new-run",
        )


def run_ids(store: ObjectStore) -> list[str]:
    """The ids of all runs that left something, oldest first."""
    return [name for name in store.list_folders("runs/") if name != OPEN_RUNS]


def require_run(store: ObjectStore, run_id: str) -> tuple[RunFolder, RunRecord]:
    """An existing run, or a ConfigError that names the newest ones."""
    folder = RunFolder(store, run_id)
    # A folder below a run is none.
    record = folder.record() if run_id and "/" not in run_id else None
    if record is None:
        known = run_ids(store)
        raise ConfigError(
            f"no run '{run_id}' in this workspace",
            where=store.root_uri,
            next_step=f"use one of: {', '.join(known[-10:]) or 'none yet'}",
        )
    return folder, record


OPEN_RUNS = "open"
# Set by `convoy submit` for all tries of a job that is to begin anew: the id of the first of them.
SUBMISSION_VARIABLE = "CONVOY_SUBMISSION"
_BEGUN = "submissions/"


class OpenRun:
    """The pointer from a target (what a job writes to) to its unfinished run.

    It is made by create-if-absent before anything else is written, and emptied after the run is committed, so a
    killed job finds its run again without any clock and without searching. It is emptied, not deleted, as a store
    deletes whatever is there, and that may be the pointer to a newer run.
    """

    def __init__(self, store: ObjectStore, *, verb: str, target: str) -> None:
        self._store = store
        name = f"{digest([verb, target])}.json"
        self._key = f"runs/{OPEN_RUNS}/{name}"
        submission = os.environ.get(SUBMISSION_VARIABLE)
        self._begun_key = f"{_BEGUN}{submission}/{name}" if submission else None

    def current(self) -> RunFolder | None:
        """The unfinished run of this target, if there is one."""
        pointer = _read_pointer(self._store, self._key)
        return self._folder(pointer.run_id) if pointer.run_id else None

    def unfinished(self) -> RunFolder | None:
        """The same, without a finished run that died before it closed its pointer."""
        folder = self.current()
        return None if folder is None or folder.is_finished() else folder

    def begun_with(self, settings: Mapping[str, Any]) -> RunRecord | None:
        """The record of the unfinished run, if its config says the same of these keys."""
        folder = self.unfinished()
        record = None if folder is None else folder.record()
        if record is None:
            return None
        # A setting that an older Convoy had not is none that was changed.
        begun = {key: record.config.get(key) for key in settings}
        return None if differences(begun, dict(settings)) else record

    def begins_anew(self, new_run: bool) -> bool:
        """Whether runs of this target that are there do not count: it was asked for, and no try before did it."""
        return new_run and (self._begun_key is None or not exists(self._store, self._begun_key))

    def resume(self, identity: dict[str, Any], *, new_run: bool) -> tuple[RunFolder | None, RunRecord | None]:
        """The unfinished run of this target and its record, as far as they exist.

        A finished run that died before it closed its pointer is closed. Raises RunMismatch if the unfinished
        run has another identity; with `new_run` it is left behind instead, unless a try before began it.
        """
        folder = self.current()
        if folder is not None and (folder.is_finished() or self.begins_anew(new_run)):
            self.close(folder)
            folder = None
        record = folder.record() if folder else None
        if record is not None:
            refuse_changed_identity(record, identity)
            _warn_of_other_versions(record)
        return folder, record

    def is_open_for(self, identity: dict[str, Any]) -> bool:
        """Whether `resume` would go on with an unfinished run of this target."""
        folder = self.unfinished()
        return folder is not None and not _is_anothers(folder, identity)

    def is_anothers(self, identity: dict[str, Any]) -> bool:
        """Whether `resume` would refuse, as the unfinished run of this target has another identity."""
        folder = self.unfinished()
        return folder is not None and _is_anothers(folder, identity)

    def start(self) -> RunFolder:
        """Open a new run, or join the one that another process opened in the meantime.

        Later tries of the same submission will know that it was begun.
        """
        folder = self._open()
        if self._begun_key is not None:
            # Only now: a try that dies before it has done nothing that the next one could go on with.
            self._store.put(self._begun_key, canonical_json({"run_id": folder.run_id}))
        return folder

    def _open(self) -> RunFolder:
        # Begins with the time, so that ids sort by age; nothing but the order in lists depends on it.
        run_id = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(4)}"
        try:
            open_pointer(self._store, self._key, run_id)
        except PreconditionFailed:
            current = self.current()
            if current is not None:
                return current
            return self._open()
        crash_point(CrashPoint.RUN_OPENED)
        return self._folder(run_id)

    def close(self, folder: RunFolder) -> None:
        """Forget the pointer to a run, unless it names another one by now; the run's files stay."""
        close_pointer(self._store, self._key, folder.run_id)
        crash_point(CrashPoint.RUN_CLOSED)

    def _folder(self, run_id: str) -> RunFolder:
        return RunFolder(self._store, run_id, open_key=self._key)


def finished_run(store: ObjectStore, pointer_key: str) -> RunFolder | None:
    """The finished run that a pointer to an answer names, or None where there is no such pointer or no such run."""
    document = read_json(store, pointer_key)
    folder = None if document is None else RunFolder(store, document["run_id"])
    return folder if folder is not None and folder.is_finished() else None


@dataclass(frozen=True, slots=True)
class _Pointer:
    """A pointer as it was read: `run_id` is empty while no run is open, `etag` None where there never was one."""

    run_id: str = ""
    etag: str | None = None


def _read_pointer(store: ObjectStore, key: str) -> _Pointer:
    try:
        blob = store.get(key)
    except ObjectNotFound:
        return _Pointer()
    run_id = parse_json(blob.data, where=store.uri(key))["run_id"] if blob.data else ""
    return _Pointer(run_id, blob.etag)


def open_pointer(store: ObjectStore, key: str, run_id: str) -> None:
    """Let a pointer that names no run name this one; PreconditionFailed if it names another."""
    pointer = _read_pointer(store, key)
    if pointer.run_id == run_id:
        return
    if pointer.run_id:
        raise PreconditionFailed("the pointer names another run", where=store.uri(key))
    put_looking_first(store, key, canonical_json({"run_id": run_id}), replaced_etag=pointer.etag)


def close_pointer(store: ObjectStore, key: str, run_id: str) -> None:
    """Let a pointer to this run name none; one to another run is left as it is."""
    pointer = _read_pointer(store, key)
    if pointer.run_id == run_id:
        with suppress(PreconditionFailed):
            put_looking_first(store, key, b"", replaced_etag=pointer.etag)


def open_pointers(store: ObjectStore) -> dict[str, str]:
    """The unfinished runs that a command would go on with: their ids, and the keys of the pointers to them."""
    found = {}
    for info in store.list_objects(f"runs/{OPEN_RUNS}/"):
        if info.size_bytes and (run_id := _read_pointer(store, info.key).run_id):
            found[run_id] = info.key
    return found


def _is_anothers(folder: RunFolder, identity: dict[str, Any]) -> bool:
    record = folder.record()
    return record is not None and bool(_changes(record, identity))


def _changes(record: RunRecord, identity: dict[str, Any]) -> list[str]:
    return describe_changes(record.identity, json.loads(canonical_json(identity)))


def _warn_of_other_versions(record: RunRecord) -> None:
    """Say where what goes on with a run is not what began it: a fix of a bug may be why, and so it is not refused."""
    if changes := describe_changes(record.versions, current_versions()):
        _log.warning(
            "run %s goes on with other code or libraries than it began with, so last bits may differ:\n%s",
            record.run_id,
            "\n".join(changes),
        )


def refuse_changed_identity(record: RunRecord, identity: dict[str, Any]) -> None:
    """Raise RunMismatch, naming each difference, unless the unfinished run has this identity."""
    if changes := _changes(record, identity):
        raise RunMismatch(
            "an unfinished run for the same target had other inputs or settings:\n" + "\n".join(changes),
            where=f"runs/{record.run_id}",
            next_step="restore them to finish that run, or add --new-run to leave it and start afresh",
        )
