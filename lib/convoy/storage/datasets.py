"""Datasets of a workspace: versions of a frozen manifest, and a pointer to the current one.

    datasets/<name>/versions/<fingerprint>/manifest.parquet, summary.json
    datasets/<name>/current.json

A version is written whole before the pointer moves, and nothing of it changes afterwards, except where its
bytes lie if the same content is found at a new place, and how its samples were found and what was left out.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from convoy.core.config import StrictModel
from convoy.core.differences import describe_changes
from convoy.core.errors import (
    ConditionalWriteUnsupported,
    ConfigError,
    DataError,
    ObjectNotFound,
    PreconditionFailed,
)
from convoy.core.fingerprints import canonical_json
from convoy.core.splits import SplitOptions
from convoy.storage.documents import parse_json, read_json
from convoy.storage.manifests import (
    Manifest,
    ManifestHeader,
    count_samples,
    fingerprint_samples,
    write_manifest,
)
from convoy.storage.object_store import ObjectStore, put_in_place_of
from convoy.storage.sources.comparison import ManifestChanges, compare_samples, describe_moves
from convoy.storage.sources.completion import complete_rows, find_problems
from convoy.storage.sources.reading import read_source
from convoy.storage.sources.rows import ReadingOptions, SourceKind
from convoy.storage.stores import open_store

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class DatasetVersion(StrictModel):
    """A version of a dataset as `freeze_dataset` found it. `skipped` counts by reason what is no sample.

    `made_otherwise` has a line for each setting, or the source, that the version before was made with otherwise.
    """

    name: str
    kind: SourceKind
    manifest_uri: str
    header: ManifestHeader
    changes: ManifestChanges
    skipped: dict[str, int]
    warnings: tuple[str, ...]
    made_otherwise: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pointer:
    """`current.json` as it was read; `etag` is "" where there is none yet."""

    fingerprint: str = ""
    etag: str = ""


def freeze_dataset(
    store: ObjectStore,
    name: str,
    source: str,
    *,
    reading: ReadingOptions | None = None,
    splits: SplitOptions | None = None,
    check: Callable[[DatasetVersion], None] | None = None,
) -> DatasetVersion:
    """Find all samples of a source, and make their manifest the current version of a dataset.

    The same call refreshes the dataset: tar shards and parquet files that did not change are not read again,
    and a source with the same content gives the same fingerprint and no new version. What `splits` do not tell is as
    in the version before; one that was made otherwise is replaced with a warning. `check` may raise an error before
    anything is written. The workspace is never a part
    of a source that it lies in. Raises DataError for a source that cannot be used or has no sample, ConfigError for
    one that is the workspace, and PreconditionFailed if another process froze another version meanwhile; that one
    stays the current.
    """
    reading = reading or ReadingOptions()
    source_uri = open_store(source).root_uri
    pointer = _read_pointer(store, name)
    previous = Manifest.open(store, _manifest_key(name, pointer.fingerprint)) if pointer.fingerprint else None
    known = _same_source(previous, source_uri, reading)
    kind, scan = read_source(source_uri, reading, known, workspace=store.root_uri)
    if not scan.samples.num_rows:
        notes = reading_notes(scan.skipped, scan.warnings)
        raise DataError(
            "; ".join([f"the source has no sample, read as {kind.value}", *notes]),
            where=source_uri,
            next_step="check the URI, or name the layout with --set reading.kind=...",
        )
    splits = (splits or SplitOptions()).on_top_of(None if previous is None else previous.header.splits)
    samples, classes = complete_rows(scan, splits)
    header = ManifestHeader(
        fingerprint=fingerprint_samples(samples, classes),
        num_samples=samples.num_rows,
        classes=classes,
        counts=count_samples(samples, len(classes)),
        source=source_uri,
        reading=reading.model_dump(mode="json"),
        splits=splits,
        incomplete=scan.incomplete,
        skipped_in=scan.skipped_in,
    )
    made_otherwise = () if previous is None else tuple(_made_otherwise(previous.header, header))
    changes = compare_samples(previous, samples, classes)
    version = DatasetVersion(
        name=name,
        kind=kind,
        manifest_uri=store.uri(_manifest_key(name, header.fingerprint)),
        header=header,
        changes=changes,
        skipped=scan.skipped,
        warnings=(
            *_warn_of(made_otherwise),
            *scan.warnings,
            *find_problems(samples, classes),
            *describe_moves(changes),
        ),
        made_otherwise=made_otherwise,
    )
    if check is not None:
        check(version)
    return _publish(store, version, samples, pointer, previous)


def refuse_made_otherwise(version: DatasetVersion) -> None:
    """ConfigError for a version that would replace one of another source, or one that was read or split otherwise."""
    if version.made_otherwise:
        raise ConfigError(
            "\n".join([f"the dataset '{version.name}' was made otherwise:", *version.made_otherwise]),
            where=version.manifest_uri.partition("/versions/")[0],
            next_step="restore that, or give another name; or make it anew, for all who use it, with"
            f" `convoy dataset {version.header.source} --name {version.name}` and the settings of now",
        )


def open_dataset(store: ObjectStore, name: str, fingerprint: str | None = None) -> Manifest:
    """The manifest of a dataset's current version, or of the one with this fingerprint.

    Raises DataError that names what there is, if there is no such dataset or version.
    """
    wanted = fingerprint or _read_pointer(store, name).fingerprint
    if not wanted:
        raise DataError(
            f"there is no dataset '{name}', only: {', '.join(list_datasets(store)) or 'none'}",
            where=store.root_uri,
            next_step=f"freeze it with `convoy dataset SOURCE --name {name}`",
        )
    try:
        return Manifest.open(store, _manifest_key(name, wanted))
    except ObjectNotFound:
        versions = store.list_folders(f"datasets/{name}/versions/")
        raise DataError(
            f"dataset '{name}' has no version {wanted}, only: {', '.join(versions) or 'none'}",
            where=store.root_uri,
        ) from None


def list_datasets(store: ObjectStore) -> list[str]:
    """The names of the datasets of a workspace, sorted."""
    return store.list_folders("datasets/")


def reading_notes(skipped: Mapping[str, int], warnings: Iterable[str]) -> Iterator[str]:
    """For people: how much of a source is no sample, by reason, and what looks wrong."""
    yield from (f"{count} objects skipped as {reason}" for reason, count in skipped.items())
    yield from warnings


def notes_of_version(store: ObjectStore, name: str, fingerprint: str) -> list[str]:
    """The same of a version, as it was when that was frozen."""
    summary = read_json(store, _summary_key(name, fingerprint)) or {}
    return list(reading_notes(summary.get("skipped", {}), summary.get("warnings", ())))


def _same_source(previous: Manifest | None, source_uri: str, reading: ReadingOptions) -> Manifest | None:
    if previous is None or previous.header.source != source_uri:
        return None
    return None if _reading_changes(previous.header, reading.model_dump(mode="json")) else previous


def _made_otherwise(before: ManifestHeader, now: ManifestHeader) -> Iterator[str]:
    """In what the settings of two versions differ, as far as the one before has kept them."""
    if _place(before.source) != _place(now.source):
        yield from describe_changes({"source": before.source}, {"source": now.source})
    yield from _reading_changes(before, now.reading)
    if before.splits is not None and now.splits is not None:
        options = before.splits.model_dump(), now.splits.model_dump()
        yield from describe_changes({"splits": options[0]}, {"splits": options[1]})


def _warn_of(made_otherwise: Iterable[str]) -> Iterator[str]:
    changes = "; ".join(line.strip() for line in made_otherwise)
    if changes:
        yield f"the version before was made otherwise, so samples may have changed ids, labels or splits: {changes}"


def _reading_changes(before: ManifestHeader, reading: Mapping[str, Any]) -> list[str]:
    """In what a version was read otherwise; a kind that is not told is the one that is found."""
    old, new = _reading_of(before), dict(reading)
    if None in (old["kind"], new["kind"]):
        old["kind"] = new["kind"] = None
    return describe_changes({"reading": old}, {"reading": new})


def _place(source: str) -> str:
    """A source by whatever name: of a local one without links."""
    return source if "://" in source else os.path.realpath(source)


def _reading_of(header: ManifestHeader) -> dict[str, Any]:
    """How a version was read, with the defaults of the options that an older Convoy had not."""
    return ReadingOptions.model_validate(header.reading).model_dump(mode="json")


def _publish(
    store: ObjectStore,
    version: DatasetVersion,
    samples: pa.Table,
    pointer: _Pointer,
    previous: Manifest | None,
) -> DatasetVersion:
    """Write what is new of a version; the same samples, found in another way, are the same one with another header."""
    fingerprint = version.header.fingerprint
    is_current = fingerprint == pointer.fingerprint
    is_written = is_current and previous is not None and previous.header == version.header
    if not is_written or version.changes.moved:
        write_manifest(store, _manifest_key(version.name, fingerprint), samples, version.header)
    elif (read_json(store, _summary_key(version.name, fingerprint)) or {}).get("skipped") == version.skipped:
        # Some of its warnings are of what its first freeze did.
        return version
    store.put(_summary_key(version.name, fingerprint), canonical_json(version))
    return version if is_current else _move_pointer(store, version, pointer)


def _move_pointer(store: ObjectStore, version: DatasetVersion, pointer: _Pointer) -> DatasetVersion:
    key = _pointer_key(version.name)
    document = canonical_json(
        {
            "fingerprint": version.header.fingerprint,
            "previous": pointer.fingerprint,
            "frozen_utc": datetime.now(UTC).isoformat(timespec="seconds"),
            # A conditional write that was refused tells its own earlier attempt from another's by this.
            "writer": secrets.token_hex(8),
        }
    )
    try:
        put_in_place_of(store, key, document, pointer.etag or None)
    except PreconditionFailed:
        if _read_pointer(store, version.name).fingerprint == version.header.fingerprint:
            return version
        raise PreconditionFailed(
            "another process froze another version of the dataset meanwhile",
            where=store.uri(key),
            next_step="run the same command again",
        ) from None
    except ConditionalWriteUnsupported:
        store.put(key, document)
        warning = "this store cannot exclude two refreshes of a dataset at a time; run only one"
        return version.model_copy(update={"warnings": (*version.warnings, warning)})
    return version


def _read_pointer(store: ObjectStore, name: str) -> _Pointer:
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"'{name}' cannot name a dataset", next_step="use letters and digits, and '.', '_' or '-' inside"
        )
    try:
        blob = store.get(_pointer_key(name))
    except ObjectNotFound:
        return _Pointer()
    document = parse_json(blob.data, where=store.uri(_pointer_key(name)))
    return _Pointer(fingerprint=document["fingerprint"], etag=blob.etag)


def _pointer_key(name: str) -> str:
    return f"datasets/{name}/current.json"


def _manifest_key(name: str, fingerprint: str) -> str:
    return f"datasets/{name}/versions/{fingerprint}/manifest.parquet"


def _summary_key(name: str, fingerprint: str) -> str:
    return f"datasets/{name}/versions/{fingerprint}/summary.json"
