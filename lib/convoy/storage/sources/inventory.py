"""Samples from a report of S3 Inventory: what a bucket held on a day, without listing it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.compute as pc

from convoy.core.errors import ConfigError, DataError
from convoy.storage.object_store import ObjectInfo, ObjectStore
from convoy.storage.sources.folders import FolderLayout, find_layout, join_parts, read_objects
from convoy.storage.sources.inventory_files import InventoryReport, find_files, iter_file, open_report
from convoy.storage.sources.listing import SourceRoot, is_hidden
from convoy.storage.sources.rows import ReadingOptions, Skips, SourceScan

# Each has a file of the report on disk.
_NUM_FILES_AT_A_TIME = 4
_OUTSIDE, _OLD_VERSION, _DELETE_MARKER, _ARCHIVED = "outside", "old_version", "delete_marker", "archived"
# What lies in these can be read hours after somebody has asked for it.
_ARCHIVE_CLASSES = pa.array(["GLACIER", "DEEP_ARCHIVE"])
_ARCHIVE_TIERS = pa.array(["ARCHIVE", "ARCHIVE_ACCESS", "DEEP_ARCHIVE", "DEEP_ARCHIVE_ACCESS"])
# Under these an etag may be the MD5; "" is a report that does not say.
_MD5_ENCRYPTIONS = pa.array(["", "NOT-SSE", "SSE-S3"])
# The first two folders of a key, as far as it has them.
_TOP_FOLDERS = r"(?s)^((?:[^/]*/){0,2}).*$"
_OBJECTS_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string()),
        pa.field("size_bytes", pa.int64()),
        pa.field("etag", pa.string()),
        pa.field("checksum", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """What one file of a report says: objects below the root as rows of _OBJECTS_SCHEMA, and their top folders."""

    objects: pa.Table
    folders: frozenset[str]
    skips: Skips


def read_inventory(uri: str, options: ReadingOptions, *, workspace: str = "") -> SourceScan:
    """All samples of a report (see `open_report`), such as class folders gave them at its time.

    Ids are keys below `images_root`, else in the source bucket. Left out are what lies elsewhere, the workspace,
    versions that are not the latest, delete markers and archived objects. An etag is a checksum unless the report
    says that it is none. Raises DataError for a report that cannot be used, and ConfigError for a root in another
    bucket.
    """
    report, manifest_uri = open_report(uri)
    bucket_uri = f"s3://{report.source_bucket}/"
    root = SourceRoot.open(options.images_root or bucket_uri, workspace)
    root_uri = f"{root.store.root_uri}/"
    if not root_uri.startswith(bucket_uri):
        raise ConfigError(
            f"the report is of {bucket_uri}", where=root_uri, next_step="set reading.images_root inside of it"
        )
    parts = _read_parts(report, manifest_uri, root_uri.removeprefix(bucket_uri), root.workspace_key)
    left_out = Skips()
    for part in parts:
        left_out.update(part.skips)
    folders = frozenset[str]().union(*(part.folders for part in parts))
    layout = find_layout(lambda above: _folders_in(folders, above), options.labels, where=root_uri)
    scan = join_parts(_read_samples(root.store, parts, layout), layout)
    return SourceScan(
        samples=scan.samples,
        skipped={**left_out.counts, **scan.skipped},
        warnings=(*_explain(report, left_out), *scan.warnings, *root.warnings),
    )


def _read_parts(report: InventoryReport, manifest_uri: str, prefix: str, workspace_key: str) -> list[_Part]:
    if not report.files:
        return []
    store, keys = find_files(report, manifest_uri)
    batches = [iter_file(report, file, store, key) for file, key in zip(report.files, keys, strict=True)]
    with ThreadPoolExecutor(_NUM_FILES_AT_A_TIME, thread_name_prefix="inventory") as pool:
        return list(
            pool.map(lambda rows, key: _read_part(rows, prefix, workspace_key, store.uri(key)), batches, keys)
        )


def _read_part(batches: Iterable[pa.RecordBatch], prefix: str, workspace_key: str, where: str) -> _Part:
    """The objects that the rows of one file describe, and of which something can be read now."""
    skips = Skips()
    folders: set[str] = set()
    chunks = []
    for batch in batches:
        rows = _leave_out(batch, pc.invert(pc.starts_with(batch["key"], prefix)), _OUTSIDE, skips)
        if workspace_key:
            rows = rows.filter(pc.invert(pc.starts_with(rows["key"], prefix + workspace_key)))
        rows = _leave_out(rows, pc.invert(rows["is_latest"]), _OLD_VERSION, skips)
        rows = _leave_out(rows, rows["is_delete_marker"], _DELETE_MARKER, skips)
        below = pc.utf8_slice_codeunits(rows["key"], len(prefix))
        folders.update(pc.replace_substring_regex(below, _TOP_FOLDERS, r"\1").unique().to_pylist())
        rows = _leave_out(rows, _is_archived(rows), _ARCHIVED, skips)
        chunks.append(_to_objects(rows, len(prefix), where))
    return _Part(
        objects=pa.Table.from_batches(chunks, schema=_OBJECTS_SCHEMA), folders=frozenset(folders), skips=skips
    )


def _leave_out(rows: pa.RecordBatch, mask: pa.Array, reason: str, skips: Skips) -> pa.RecordBatch:
    """The rows where the mask is not true; a report that does not say, says no."""
    is_out = pc.fill_null(mask, False)
    skips.add_all(reason, rows.filter(is_out)["key"])
    return rows.filter(pc.invert(is_out))


def _is_archived(rows: pa.RecordBatch) -> pa.Array:
    in_class = pc.is_in(rows["storage_class"], _ARCHIVE_CLASSES)
    return pc.or_(in_class, pc.is_in(rows["intelligent_tiering_access_tier"], _ARCHIVE_TIERS))


def _to_objects(rows: pa.RecordBatch, num_prefix: int, where: str) -> pa.RecordBatch:
    # Markers of folders, as a listing leaves them out.
    is_marker = pc.and_(pc.ends_with(rows["key"], "/"), pc.equal(rows["size"], 0))
    is_root = pc.equal(pc.utf8_length(rows["key"]), num_prefix)
    rows = rows.filter(pc.invert(pc.or_(is_root, pc.fill_null(is_marker, False))))
    etags = pc.utf8_trim(rows["e_tag"], '"')
    if rows["size"].null_count or etags.null_count or pc.any(pc.equal(etags, "")).as_py():
        raise DataError(
            "the report has objects without size or etag", where=where, next_step="take another report"
        )
    columns = [pc.utf8_slice_codeunits(rows["key"], num_prefix), rows["size"], etags, _checksums(rows, etags)]
    return pa.RecordBatch.from_arrays(columns, schema=_OBJECTS_SCHEMA)


def _checksums(rows: pa.RecordBatch, etags: pa.Array) -> pa.Array:
    """For each object md5:<hex>, where the etag is the MD5 as far as the report says, else an empty text."""
    is_md5 = pc.match_substring_regex(etags, "^[0-9a-f]{32}$")
    is_whole = pc.invert(pc.fill_null(rows["is_multipart_uploaded"], False))
    is_plain = pc.is_in(pc.fill_null(rows["encryption_status"], ""), _MD5_ENCRYPTIONS)
    md5s = pc.binary_join_element_wise("md5", etags, ":")
    return pc.if_else(pc.and_(pc.and_(is_md5, is_whole), is_plain), md5s, "")


def _folders_in(folders: Iterable[str], above: str) -> list[str]:
    """The visible folders of the root (""), or those of one of its folders (with '/' at the end)."""
    below = (folder.removeprefix(above) for folder in folders if folder.startswith(above))
    names = {folder.partition("/")[0] for folder in below if folder}
    return sorted(name for name in names if not is_hidden(name))


def _read_samples(
    store: ObjectStore, parts: list[_Part], layout: FolderLayout
) -> Iterator[tuple[pa.Table, Skips]]:
    """The samples of each part; of the parts only what is still to be read stays in memory."""
    while parts:
        yield read_objects(store, _iter_objects(parts.pop(0).objects), layout)


def _iter_objects(objects: pa.Table) -> Iterator[ObjectInfo]:
    for batch in objects.to_batches():
        for key, size_bytes, etag, checksum in zip(
            *(column.to_pylist() for column in batch.columns), strict=True
        ):
            yield ObjectInfo(key=key, size_bytes=size_bytes, etag=etag, checksum=checksum)


def _explain(report: InventoryReport, left_out: Skips) -> Iterator[str]:
    if report.created_unix_ms is not None:
        created = datetime.fromtimestamp(report.created_unix_ms / 1000, UTC)
        yield f"the report is of {created:%Y-%m-%d %H:%M} UTC: what came later is missing, what changed is a reject"
    if left_out.counts[_ARCHIVED]:
        yield f"archived objects were left out: {left_out.describe(_ARCHIVED)}"
