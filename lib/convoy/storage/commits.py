"""The commit: from many attempts of many workers to one published result, by rules that survive any kill.

Workers write immutable, attempt-unique files and then one record an attempt. The driver chooses one attempt a
slice, compares every chosen file with a fresh listing, publishes the choice with one create-if-absent, and only
then deletes what was not chosen: a driver that lost the race to publish adopts the winner's choice and can
never delete a winner's file. Readers see a set's rows only through `commits/`, written after that.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from convoy.core.config import StrictModel
from convoy.core.crash_points import CrashPoint, crash_point
from convoy.core.errors import DataError, PreconditionFailed, StorageError
from convoy.core.fingerprints import MultisetDigest, canonical_json
from convoy.core.json_values import finite_or_null
from convoy.core.records import RETRIED_CODES
from convoy.storage.documents import parse_json, parse_model, read_model
from convoy.storage.object_store import ObjectInfo, ObjectStore, put_looking_first
from convoy.storage.runs import INPUT, RunFolder, RunRecord

_LISTING_THREADS = 16


class PartFile(StrictModel):
    """One immutable file: where it is, and what proves that it is still the same."""

    key: str
    size_bytes: int
    etag: str
    checksum: str
    num_rows: int
    rows_digest: str

    def is_what(self, listed: ObjectInfo | None) -> bool:
        """Whether a listing shows this very file."""
        return listed is not None and (listed.size_bytes, listed.etag) == (self.size_bytes, self.etag)


class SliceRecord(StrictModel):
    """What one finished attempt of a slice wrote, and how long each stage took.

    Times are seconds since 1970: `first_row_unix_s` is when the first batch was through the network (0 if no
    image was usable);
    `precision_effect` the lowest cosine similarity to float32 features seen in one batch, by tap. `num_retries` are
    requests to object stores that had to be repeated. `bytes_read` are those of images, in all passes over them;
    `get_requests` and `put_requests` all that the worker sent to object stores since its slice before: None in records
    of before they were counted, and where no worker made the slice.
    """

    run_id: str
    slice: str
    attempt: str
    parts: dict[str, PartFile]
    rejects: PartFile | None
    num_results: int
    num_rejects: int
    reject_codes: dict[str, int]
    flags: dict[str, int]
    seconds: dict[str, float]
    started_unix_s: float
    first_row_unix_s: float
    finished_unix_s: float
    precision_effect: dict[str, float]
    bytes_read: int = 0
    num_retries: int = 0
    get_requests: int | None = None
    put_requests: int | None = None

    @property
    def files(self) -> list[PartFile]:
        """All files of the attempt."""
        return [*self.parts.values(), *([self.rejects] if self.rejects else [])]

    @property
    def unfetched(self) -> int:
        """How many of the rejects are samples that could not be fetched, which another try may."""
        return sum(number for code, number in self.reject_codes.items() if code in RETRIED_CODES)


class RunManifest(StrictModel):
    """`manifest.json`: the single truth of a finished run, one attempt a slice."""

    run_id: str
    slices: tuple[SliceRecord, ...]

    @property
    def num_results(self) -> int:
        """Samples with results."""
        return sum(record.num_results for record in self.slices)

    @property
    def num_rejects(self) -> int:
        """Samples that were rejected."""
        return sum(record.num_rejects for record in self.slices)

    def rows_digest(self) -> str:
        """A digest of all result rows that depends neither on order nor on slices or attempts."""
        return MultisetDigest.total(
            part.rows_digest for record in self.slices for part in record.parts.values()
        )


class SetCommit(StrictModel):
    """`features/<set>/commits/<run>.json`: the rows that one run adds to a set."""

    run_id: str
    committed_unix_s: float
    parts: tuple[PartFile, ...]
    rejects: tuple[PartFile, ...]


FEATURES = "features/"


def feature_prefix(set_id: str, run_id: str) -> str:
    """Where a run writes its parts of a set; readable by a glob with the run as a Hive partition."""
    return f"{FEATURES}{set_id}/run={run_id}/"


def part_key(prefix: str, slice_name: str, attempt: str) -> str:
    """The key of one attempt's part."""
    return f"{prefix}part-{slice_name}-{attempt}.parquet"


def record_key(record: SliceRecord) -> str:
    """The key of an attempt's record."""
    return f"runs/{record.run_id}/records/{record.slice}-{record.attempt}.json"


def write_record(store: ObjectStore, record: SliceRecord) -> None:
    """Write an attempt's record: from here on the attempt counts.

    One that comes after its run was published without it, from a worker that hung, takes its files back: whoever
    publishes deletes only what is there at that time.
    """
    store.put(record_key(record), canonical_json(record))
    crash_point(CrashPoint.RECORD_WRITTEN)
    manifest = read_manifest(RunFolder(store, record.run_id))
    if manifest is not None:
        chosen = {file.key for one in manifest.slices for file in one.files}
        store.delete(file.key for file in record.files if file.key not in chosen)


def read_records(folder: RunFolder, *, left_out: Collection[str] = ()) -> list[SliceRecord]:
    """All records of all attempts that finished, from storage alone. DataError if one is damaged.

    `left_out` are keys of records that do not count.
    """
    blobs = _record_blobs(folder)
    return [
        _parse_record(blob, folder.store.uri(info.key)) for info, blob in blobs if info.key not in left_out
    ]


def damaged_records(folder: RunFolder) -> list[ObjectInfo]:
    """The records of a run that nobody can read. What another Convoy may have written is none of them."""
    return [info for info, blob in _record_blobs(folder) if _is_damaged(blob, folder.store.uri(info.key))]


def _record_blobs(folder: RunFolder) -> Iterator[tuple[ObjectInfo, bytes]]:
    listed = list(folder.store.list_objects(folder.key("records/")))
    with ThreadPoolExecutor(_LISTING_THREADS) as pool:
        yield from zip(listed, pool.map(lambda info: folder.store.get(info.key).data, listed), strict=True)


def _parse_record(data: bytes, where: str) -> SliceRecord:
    try:
        return parse_model(SliceRecord, data, where=where)
    except DataError as error:
        remedy = (
            "`convoy runs repair RUN --apply` removes it, and the same command computes its slice again"
            if _is_damaged(data, where)
            else "upgrade Convoy if a newer one wrote it, or delete it: the same command computes its slice again"
        )
        raise DataError(error.what, where=where, next_step=remedy) from error


def _is_damaged(data: bytes, where: str) -> bool:
    try:
        parse_json(data, where=where)
    except DataError:
        return True
    return False


def choose_attempts(
    folder: RunFolder, run: RunRecord, records: Iterable[SliceRecord]
) -> dict[str, SliceRecord]:
    """One verified attempt for each slice that has one. A record without all its files does not count."""
    listed = {info.key: info for info in _written_files(folder, run)}
    chosen: dict[str, SliceRecord] = {}
    for record in sorted(records, key=lambda record: (record.slice, record.attempt)):
        if record.slice not in chosen and all(file.is_what(listed.get(file.key)) for file in record.files):
            chosen[record.slice] = record
    return chosen


def publish(folder: RunFolder, run: RunRecord, records: Iterable[SliceRecord]) -> RunManifest:
    """Commit the run to its last step; every step may be repeated after a kill."""
    manifest = read_manifest(folder) or _publish_choice(folder, run, records)
    crash_point(CrashPoint.MANIFEST_PUBLISHED)
    _delete_losers(folder, run, manifest)
    crash_point(CrashPoint.LOSERS_DELETED)
    for set_id, prefix in sorted(run.outputs.items()):
        if prefix.startswith(FEATURES):
            commit_set(folder.store, set_id, manifest)
            crash_point(CrashPoint.SET_COMMITTED)
    return manifest


def finish(folder: RunFolder, report: dict[str, object]) -> None:
    """Write the report, in which what is not finite is null, then the marker that ends the run."""
    text = json.dumps(finite_or_null(report), indent=2, sort_keys=True, allow_nan=False)
    folder.store.put(folder.key("report.json"), text.encode())
    folder.store.put(folder.key("_SUCCESS"), b"")
    crash_point(CrashPoint.SUCCESS_WRITTEN)


def read_manifest(folder: RunFolder) -> RunManifest | None:
    """The published manifest of a run, or None before it was published."""
    return read_model(RunManifest, folder.store, folder.key("manifest.json"))


def read_commits(store: ObjectStore, set_id: str) -> list[SetCommit]:
    """What all finished runs added to a set, in the order of their run ids."""
    keys = [info.key for info in store.list_objects(f"{FEATURES}{set_id}/commits/")]
    with ThreadPoolExecutor(_LISTING_THREADS) as pool:
        blobs = pool.map(store.get, keys)
        return [
            parse_model(SetCommit, blob.data, where=store.uri(key))
            for key, blob in zip(keys, blobs, strict=True)
        ]


def commit_set(store: ObjectStore, set_id: str, manifest: RunManifest) -> None:
    """Make the rows of a run visible in a set, or only those of the slices that the manifest still has."""
    records = [record for record in manifest.slices if set_id in record.parts]
    commit = SetCommit(
        run_id=manifest.run_id,
        committed_unix_s=time.time(),
        parts=tuple(record.parts[set_id] for record in records),
        rejects=tuple(record.rejects for record in records if record.rejects),
    )
    store.put(f"{FEATURES}{set_id}/commits/{manifest.run_id}.json", canonical_json(commit))


def _publish_choice(folder: RunFolder, run: RunRecord, records: Iterable[SliceRecord]) -> RunManifest:
    chosen = choose_attempts(folder, run, records)
    missing = [name for name in run.slice_names() if name not in chosen]
    if missing:
        raise StorageError(
            f"{len(missing)} finished slices have no file that matches its record, first {missing[0]}",
            where=folder.prefix,
            next_step="run the same command again: only these slices are redone",
        )
    crash_point(CrashPoint.ATTEMPTS_CHOSEN)
    manifest = RunManifest(run_id=run.run_id, slices=tuple(chosen[name] for name in run.slice_names()))
    try:
        put_looking_first(folder.store, folder.key("manifest.json"), canonical_json(manifest))
    except PreconditionFailed:
        published = read_manifest(folder)
        if published is None:
            raise
        return published
    return manifest


def stray_files(folder: RunFolder, run: RunRecord, attempts: Iterable[SliceRecord]) -> Iterator[ObjectInfo]:
    """The files that lie where the run writes parts and rejects, and that none of these attempts names."""
    named = {file.key for attempt in attempts for file in attempt.files}
    return (info for info in _written_files(folder, run) if info.key not in named)


def _written_files(folder: RunFolder, run: RunRecord) -> Iterator[ObjectInfo]:
    """Everything that lies where the run writes parts and rejects, whether it counts or not."""
    prefixes = {folder.key("rejects/"), *(_listed_prefix(folder, prefix) for prefix in run.outputs.values())}
    for prefix in sorted(prefixes):
        yield from folder.store.list_objects(prefix)


def _listed_prefix(folder: RunFolder, prefix: str) -> str:
    """What is listed for an output: inside the run its top folder, as partitions of one may be thousands."""
    if not prefix.startswith(folder.prefix):
        return prefix
    return folder.key(prefix.removeprefix(folder.prefix).partition("/")[0] + "/")


def _delete_losers(folder: RunFolder, run: RunRecord, manifest: RunManifest) -> None:
    # Listed to the end first: a listing must not meet its own deletions.
    folder.store.delete([info.key for info in stray_files(folder, run, manifest.slices)])
    folder.store.delete(_unused_input(folder, run))


def _unused_input(folder: RunFolder, run: RunRecord) -> list[str]:
    """What drivers froze that died, or were replaced, before they recorded it."""
    used = {
        folder.input_key(index, shard, group.attempt)
        for index, group in enumerate(run.groups)
        for shard in range(group.num_shards)
    }
    return [info.key for info in folder.store.list_objects(folder.key(INPUT)) if info.key not in used]
