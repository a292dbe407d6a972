"""Checkpoints of a training run: immutable bytes first, then the small record that makes them count.

Every write has names of its own below `runs/<run>/checkpoints/`; nothing is renamed or overwritten. So a kill
leaves at worst bytes without a record, which nobody reads and `prune` removes, and a checkpoint that was lost or
damaged later costs the steps since the one before it. What the bytes hold is the business of who writes them.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pydantic import Field, ValidationError

from convoy.core.config import StrictModel
from convoy.core.crash_points import CrashPoint, crash_point
from convoy.core.errors import ChecksumMismatch, DataError, ObjectNotFound, StorageError
from convoy.core.fingerprints import canonical_json, digest_bytes
from convoy.storage.object_store import ObjectInfo, ObjectStore
from convoy.storage.runs import RunFolder

_DATA, _RECORD = ".safetensors", ".json"
_NAME = re.compile(r"\d{10}-[0-9a-f]{8}\.(safetensors|json)")
_READ_THREADS = 16
# What Ray Train keeps of itself in the run's folder: a folder for each start.
RAY_TRAIN = "ray_train"
# What a fit of the first head has done, until the training begins.
HEAD_POINTS = "head_points"


class CheckpointRecord(StrictModel):
    """What makes a checkpoint count: where its bytes are, and what proves them.

    `details` is JSON. `score` stands in records of before, whose best ones could be kept; nothing asks for it.
    """

    # Names have ten digits, so that their order is that of the steps.
    step: int = Field(ge=0, lt=10**10)
    key: str
    size_bytes: int
    digest: str
    score: float | None = None
    details: dict[str, Any]

    @property
    def record_key(self) -> str:
        """The key of the record itself."""
        return self.key.removesuffix(_DATA) + _RECORD


@dataclass(frozen=True, slots=True)
class LoadedCheckpoint:
    """A checkpoint whose bytes were read and have the recorded size and digest."""

    record: CheckpointRecord
    data: bytes


@dataclass(frozen=True, slots=True)
class DamagedCheckpoint:
    """A checkpoint that has a record and yet cannot be used, and why."""

    record_key: str
    step: int
    reason: str


class CheckpointFolder:
    """The checkpoints of one run. Holds no state: every answer comes from the store."""

    def __init__(self, store: ObjectStore, run_id: str) -> None:
        self._store = store
        self._prefix = RunFolder(store, run_id).key("checkpoints/")

    def write(self, step: int, data: bytes, *, details: dict[str, Any]) -> CheckpointRecord:
        """Write a checkpoint in one call to the store, then its record, and return the record.

        Raises ValueError or TypeError, before anything is written, for a step below 0 or details that are not JSON,
        such as NaN.
        """
        record = CheckpointRecord(
            step=step,
            # Unique, so that two attempts at the same step never touch each other's bytes.
            key=f"{self._prefix}{step:010d}-{secrets.token_hex(4)}{_DATA}",
            size_bytes=len(data),
            digest=digest_bytes(data).hex(),
            # As it will be read: also refuses NaN, which the record itself would turn into null.
            details=json.loads(canonical_json(details)),
        )
        self._store.put(record.key, data)
        crash_point(CrashPoint.CHECKPOINT_WRITTEN)
        self._store.put(record.record_key, canonical_json(record))
        crash_point(CrashPoint.CHECKPOINT_RECORDED)
        return record

    def newest_step(self) -> int:
        """The highest step that has a record, 0 where there is none."""
        return max(map(_step_of, _record_keys(self._list_sizes())), default=0)

    def read(self, record: CheckpointRecord) -> bytes:
        """The bytes of a checkpoint.

        Raises ObjectNotFound, or ChecksumMismatch for bytes that were not the recorded ones twice in a row.
        """
        for _attempt in range(2):
            data = self._store.get(record.key).data
            if len(data) == record.size_bytes and digest_bytes(data).hex() == record.digest:
                return data
        raise ChecksumMismatch(
            f"the checkpoint of step {record.step} is damaged: {len(data)} bytes were read,"
            f" and they are not the {record.size_bytes} bytes that were recorded",
            where=self._store.uri(record.key),
            next_step="go on from the checkpoint before it",
        )

    def newest_intact(self) -> tuple[LoadedCheckpoint | None, list[DamagedCheckpoint]]:
        """The newest checkpoint that is whole, or None, and the newer ones that are not, newest first.

        A failing store is no damage: its errors are raised. Whoever goes on from here should `discard` the
        damaged ones: they lie ahead of what is written next, and `prune` would take them for newer.
        """
        damaged: list[DamagedCheckpoint] = []
        for record_key in _record_keys(self._list_sizes()):
            try:
                record = self._read_record(record_key)
                return LoadedCheckpoint(record, self.read(record)), damaged
            except (ObjectNotFound, DataError, ChecksumMismatch) as error:
                reason = f"{error.what} [{error.where}]"
                damaged.append(DamagedCheckpoint(record_key, _step_of(record_key), reason))
        return None, damaged

    def discard(self, damaged: Iterable[DamagedCheckpoint]) -> None:
        """Delete damaged checkpoints, their records first."""
        record_keys = [checkpoint.record_key for checkpoint in damaged]
        self._store.delete(record_keys)
        self._store.delete(key.removesuffix(_RECORD) + _DATA for key in record_keys)

    def prune(self, *, keep_newest: int) -> None:
        """Delete all but the `keep_newest` highest steps, records first.

        A record counts if the listing has its bytes with the recorded size. What does not count, such as
        bytes that a killed attempt never recorded, goes once a later step counts: so a write that is under
        way is safe. ValueError unless at least one is kept.
        """
        if keep_newest < 1:
            raise ValueError("the newest checkpoint must be kept: a killed training goes on from it")
        sizes = self._list_sizes()
        records = self._records_at(_record_keys(sizes))
        counting = [record for record in records if sizes.get(record.key) == record.size_bytes]
        if not counting:
            return
        wanted = {key for record in counting[:keep_newest] for key in (record.key, record.record_key)}
        superseded = {key for record in counting for key in (record.key, record.record_key)}
        superseded.update(key for key in sizes if _step_of(key) < counting[0].step)
        doomed = sorted(superseded - wanted)
        self._store.delete(key for key in doomed if key.endswith(_RECORD))
        self._store.delete(key for key in doomed if not key.endswith(_RECORD))

    def files(self) -> list[ObjectInfo]:
        """All that lies in the folder."""
        return list(self._store.list_objects(self._prefix))

    def _list_sizes(self) -> dict[str, int]:
        return {
            info.key: info.size_bytes
            for info in self._store.list_objects(self._prefix)
            if _NAME.fullmatch(info.key.removeprefix(self._prefix))
        }

    def _records_at(self, record_keys: list[str]) -> list[CheckpointRecord]:
        with ThreadPoolExecutor(_READ_THREADS) as pool:
            return [record for record in pool.map(self._find_record, record_keys) if record]

    def _find_record(self, record_key: str) -> CheckpointRecord | None:
        try:
            return self._read_record(record_key)
        except (ObjectNotFound, DataError):
            return None

    def _read_record(self, record_key: str) -> CheckpointRecord:
        where = self._store.uri(record_key)
        try:
            record = CheckpointRecord.model_validate_json(self._store.get(record_key).data)
        except ValidationError as error:
            raise DataError("the record of the checkpoint cannot be read", where=where) from error
        # Then no two records name the same bytes, and deleting one checkpoint never harms another.
        if record.record_key != record_key:
            raise DataError("the record is one of another checkpoint", where=where)
        return record


def training_leftovers(folder: RunFolder) -> list[ObjectInfo]:
    """What nothing reads any more once the training of a run is finished.

    Its checkpoints, what Ray Train wrote, and the points of its first head.
    """
    files = CheckpointFolder(folder.store, folder.run_id).files()
    for name in (RAY_TRAIN, HEAD_POINTS):
        files += folder.store.list_objects(folder.key(f"{name}/"))
    return files


class AsyncCheckpointWriter:
    """Writes checkpoints from a thread of its own, so that training goes on meanwhile.

    At most one is under way, and after each the folder is pruned. An error of the thread is raised by the next
    `submit` or `close`, but not one of pruning: the checkpoint counts, and `notes` tell of the first such error. For
    the calls of one thread only.
    """

    def __init__(self, folder: CheckpointFolder, *, keep_newest: int) -> None:
        self._folder = folder
        self._keep_newest = keep_newest
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._under_way: Future[None] | None = None
        self.notes: tuple[str, ...] = ()

    def submit(self, step: int, data: bytes, *, details: dict[str, Any]) -> None:
        """Wait for the checkpoint before, raise its error if it had one, and begin this one otherwise."""
        self._settle()
        self._under_way = self._pool.submit(self._write, step, data, details)

    def close(self) -> None:
        """Wait for the checkpoint under way, end the thread, and raise the error if there was one."""
        self._pool.shutdown()
        self._settle()

    def _settle(self) -> None:
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def _write(self, step: int, data: bytes, details: dict[str, Any]) -> None:
        self._folder.write(step, data, details=details)
        try:
            self._folder.prune(keep_newest=self._keep_newest)
        except StorageError as error:
            self.notes = self.notes or (
                f"former checkpoints stay, and take room, as they could not be deleted: {error.what} [{error.where}];"
                " `convoy runs gc` removes them once the training has ended",
            )


def _record_keys(keys: Iterable[str]) -> list[str]:
    """The keys of records, newest first: names begin with the step, in a fixed number of digits."""
    return sorted((key for key in keys if key.endswith(_RECORD)), reverse=True)


def _step_of(key: str) -> int:
    return int(key.rpartition("/")[2].partition("-")[0])
