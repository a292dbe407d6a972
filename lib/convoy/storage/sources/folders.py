"""Samples in class folders, with or without train/ val/ test/ on top; or in any folders, without labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from convoy.core.errors import DataError
from convoy.core.splits import parse_split
from convoy.storage.object_store import ObjectInfo, ObjectStore
from convoy.storage.sources.listing import is_hidden, map_listing, visible_folders
from convoy.storage.sources.rows import (
    Skips,
    SourceKind,
    SourceRow,
    SourceScan,
    describe_examples,
    object_content_id,
    tabulate,
)
from convoy.storage.stores import open_store

_HIDDEN, _SIDE_FILE, _NO_CLASS = "hidden", "side_file", "no_class"


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderLayout:
    """Which folders of a key mean what: (split/)(class/)file. Folders below a class belong to the class."""

    splits_on_top: bool
    classes: frozenset[str]
    warnings: tuple[str, ...] = ()


def find_layout(store: ObjectStore) -> FolderLayout:
    """The layout of a root, from the names of the folders on its first one or two levels.

    Split names are split folders only if all folders have one: a class may be called "train". Two of them
    beside other folders could mean both, and are a DataError.
    """
    folders = visible_folders(store)
    named = [name for name in folders if parse_split(name)]
    if folders and len(named) == len(folders):
        classes = (name for split in folders for name in visible_folders(store, f"{split}/"))
        return FolderLayout(splits_on_top=True, classes=frozenset(classes))
    if len(named) > 1:
        others = [name for name in folders if name not in named]
        raise DataError(
            f"the folders {', '.join(named)} look like splits, but beside them lie "
            f"{describe_examples(len(others), others)}: splits or classes?",
            where=store.root_uri,
            next_step="move the other folders away, or freeze a list with a `split` column",
        )
    warnings = tuple(f"the folder '{name}' was taken for a class, not for a split" for name in named)
    return FolderLayout(splits_on_top=False, classes=frozenset(folders), warnings=warnings)


def read_folders(uri: str, kind: SourceKind) -> SourceScan:
    """All samples below a root. A sample's id is its key; any file in a class folder is a sample.

    With `kind` images, or without any class folder, the samples have no label.
    """
    store = open_store(uri)
    layout = find_layout(store)
    labelled = kind is SourceKind.FOLDERS and bool(layout.classes)
    skips = Skips()
    tables = []
    for table, skipped in map_listing(store, lambda objects: _read_range(store, objects, layout, labelled)):
        tables.append(table)
        skips.update(skipped)
    samples = pa.concat_tables(tables)
    return SourceScan(
        samples=samples,
        skipped=dict(skips.counts),
        warnings=layout.warnings + _explain(samples, skips, layout.classes if labelled else frozenset()),
    )


def _read_range(
    store: ObjectStore, objects: Iterator[ObjectInfo], layout: FolderLayout, labelled: bool
) -> tuple[pa.Table, Skips]:
    skips = Skips()
    samples = _samples_only(objects, layout, labelled, skips)
    return tabulate(_to_row(store, info, layout, labelled) for info in samples), skips


def _samples_only(
    objects: Iterator[ObjectInfo], layout: FolderLayout, labelled: bool, skips: Skips
) -> Iterator[ObjectInfo]:
    depth_needed = layout.splits_on_top + labelled
    for info in objects:
        depth = info.key.count("/")
        if is_hidden(info.key):
            skips.add(_HIDDEN, info.key)
        elif depth == 0 and _is_side_file(info.key):
            skips.add(_SIDE_FILE, info.key)
        elif depth < depth_needed:
            skips.add(_NO_CLASS, info.key)
        else:
            yield info


def _to_row(store: ObjectStore, info: ObjectInfo, layout: FolderLayout, labelled: bool) -> SourceRow:
    folders = info.key.split("/")
    uri = store.uri(info.key)
    return SourceRow(
        sample_id=info.key,
        uri=uri,
        etag=info.etag,
        size_bytes=info.size_bytes,
        content_id=object_content_id(uri, info),
        checksum=info.checksum or None,
        label=folders[int(layout.splits_on_top)] if labelled else None,
        split=parse_split(folders[0]) if layout.splits_on_top else None,
    )


def _is_side_file(name: str) -> bool:
    return name.lower().endswith((".txt", ".md")) or name.upper() in {"LICENSE", "README"}


def _explain(samples: pa.Table, skips: Skips, classes: frozenset[str]) -> tuple[str, ...]:
    warnings = []
    if skips.counts[_NO_CLASS]:
        warnings.append(f"files outside the class folders were left out: {skips.describe(_NO_CLASS)}")
    empty = sorted(classes - set(samples["label"].unique().to_pylist()))
    if empty:
        warnings.append(f"class folders without a sample: {describe_examples(len(empty), empty)}")
    return tuple(warnings)
