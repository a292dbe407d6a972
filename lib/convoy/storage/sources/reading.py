"""Reading any source: what kind it is, and its samples."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import islice

import pyarrow as pa

from convoy.core.errors import ConfigError, DataError, ObjectNotFound
from convoy.storage.local_store import LocalStore
from convoy.storage.manifests import Manifest
from convoy.storage.sources.containers import KnownContainers
from convoy.storage.sources.folders import read_folders
from convoy.storage.sources.inventory import read_inventory
from convoy.storage.sources.inventory_files import is_report, may_hold_report
from convoy.storage.sources.list_files import LIST_SUFFIXES, PATH_COLUMNS
from convoy.storage.sources.listing import SourceRoot, is_hidden
from convoy.storage.sources.lists import read_list
from convoy.storage.sources.parquets import image_columns, read_parquets, sure_image_columns
from convoy.storage.sources.rows import LabelRule, ReadingOptions, SourceKind, SourceScan, describe_examples
from convoy.storage.sources.tars import read_tars
from convoy.storage.stores import open_object

_OBJECTS_LOOKED_AT = 1000
_KIND_BY_SUFFIX = {
    ".tar": SourceKind.TARS,
    ".parquet": SourceKind.PARQUET,
    **dict.fromkeys((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"), SourceKind.FOLDERS),
}
# The options that only some kinds have.
_KINDS_WITH = {
    "images_root": (SourceKind.LIST, SourceKind.INVENTORY),
    "image_column": (SourceKind.PARQUET, SourceKind.TARS),
    "label_column": (SourceKind.PARQUET, SourceKind.LIST),
    "id_column": (SourceKind.PARQUET,),
}
_ARCHIVE_SUFFIXES = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz", ".zip")


def read_source(
    uri: str, options: ReadingOptions, previous: Manifest | None = None, *, workspace: str = ""
) -> tuple[SourceKind, SourceScan]:
    """All samples of a source, and the kind it was read as: that of the options, else the one found.

    Containers that `previous`, a manifest of the same source and options, knows in the same version are not
    read. What lies below the URI `workspace` is no part of the source. Raises DataError for what cannot be used,
    ConfigError for options that do not fit the kind, and for the workspace itself as a source.
    """
    root = SourceRoot.open(uri, workspace)
    kind = options.kind or find_kind(uri, root, options.image_column)
    _refuse_unused(options, kind, uri)
    match kind:
        case SourceKind.LIST:
            return kind, read_list(uri, options)
        case SourceKind.INVENTORY:
            return kind, read_inventory(uri, options, workspace=workspace)
        case SourceKind.FOLDERS:
            scan = read_folders(root, options.labels)
        case SourceKind.IMAGES:
            scan = read_folders(root, LabelRule.NONE)
        case SourceKind.PARQUET:
            scan = read_parquets(root, options, KnownContainers(previous))
        case SourceKind.TARS:
            scan = read_tars(root, options, KnownContainers(previous))
    return kind, _with_what_is_not_listed(root, scan)


def find_kind(uri: str, root: SourceRoot | None = None, image_column: str | None = None) -> SourceKind:
    """The kind of a source, by the name of a file or by the first 1,000 objects below its root.

    A parquet file is a list where it has a column of paths, unless `image_column` or the file itself says which
    column holds the images.
    Raises DataError where the objects are of several kinds, or archives that cannot be read by range.
    """
    name = uri.lower()
    if name.endswith(".parquet") and _is_object(uri):
        store, key = open_object(uri)
        return _kind_of_columns(store.open_parquet(key).schema_arrow, image_column)
    if name.endswith(LIST_SUFFIXES) and _is_object(uri):
        return SourceKind.LIST
    if name.endswith(".tar") and _is_object(uri):
        return SourceKind.TARS
    if name.endswith(".json") and _is_object(uri):
        return SourceKind.INVENTORY
    listing = (info.key for info in (root or SourceRoot.open(uri)).list_objects() if not is_hidden(info.key))
    keys = list(islice(listing, _OBJECTS_LOOKED_AT))
    if may_hold_report(keys) and is_report(uri):
        return SourceKind.INVENTORY
    return _kind_of_keys([key.lower() for key in keys], uri)


def _kind_of_columns(schema: pa.Schema, image_column: str | None) -> SourceKind:
    has_paths = not set(PATH_COLUMNS).isdisjoint(schema.names)
    # Beside paths, binary columns may be anything: hashes, embeddings, thumbnails.
    images = sure_image_columns(schema) if has_paths else image_columns(schema)
    return SourceKind.PARQUET if images or image_column else SourceKind.LIST


def _with_what_is_not_listed(root: SourceRoot, scan: SourceScan) -> SourceScan:
    """The scan, and word of what a listing leaves out: the workspace, and below a local root links without an end."""
    scan = replace(scan, warnings=(*scan.warnings, *root.warnings))
    if not isinstance(root.store, LocalStore):
        return scan
    links = root.store.find_unfollowed_links()
    scan = _with_links(root, scan, "circular_link", "lead to a folder that they lie in", links.circular)
    return _with_links(root, scan, "dangling_link", "lead nowhere", links.dangling)


def _with_links(root: SourceRoot, scan: SourceScan, kind: str, what: str, links: Iterable[str]) -> SourceScan:
    keys = sorted(key for key in links if root.holds(key) and not is_hidden(key))
    if not keys:
        return scan
    warning = f"links that {what} were left out: {describe_examples(len(keys), keys)}"
    return replace(scan, skipped={**scan.skipped, kind: len(keys)}, warnings=(*scan.warnings, warning))


def _refuse_unused(options: ReadingOptions, kind: SourceKind, uri: str) -> None:
    """Raise ConfigError for an option that this kind of source does not have."""
    for name, kinds in _KINDS_WITH.items():
        if getattr(options, name) is not None and kind not in kinds:
            raise ConfigError(
                f"{name} belongs to {' or '.join(kinds)}, but this source is {kind.value}",
                where=uri,
                next_step=f"leave reading.{name} out, or name the layout with --set reading.kind=...",
            )
    if options.label_column and options.labels is LabelRule.NONE:
        raise ConfigError("label_column names labels, but labels is none", where=uri)


def _kind_of_keys(keys: list[str], uri: str) -> SourceKind:
    found = {kind for key in keys for suffix, kind in _KIND_BY_SUFFIX.items() if key.endswith(suffix)}
    if not found and any(key.endswith(_ARCHIVE_SUFFIXES) for key in keys):
        raise DataError(
            "the samples are in compressed archives, which cannot be read by range",
            where=uri,
            next_step="unpack them, or write them as plain tar shards",
        )
    if len(found) > 1:
        raise DataError(
            f"the source holds several kinds of data: {', '.join(sorted(found))}",
            where=uri,
            next_step="choose one with --set reading.kind=...",
        )
    return next(iter(found), SourceKind.FOLDERS)


def _is_object(uri: str) -> bool:
    store, key = open_object(uri)
    try:
        store.head(key)
    except ObjectNotFound:
        return False
    return True
