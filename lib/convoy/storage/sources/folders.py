"""Samples in class folders, with or without train/ val/ test/ on top; or in any folders, without labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial

import pyarrow as pa
import pyarrow.compute as pc

from convoy.core.errors import DataError
from convoy.core.splits import parse_split
from convoy.storage.object_store import ObjectInfo, ObjectStore
from convoy.storage.sources.listing import ListFolders, SourceRoot, is_hidden, map_listing
from convoy.storage.sources.rows import (
    SOURCE_SCHEMA,
    LabelRule,
    Skips,
    SourceRow,
    SourceScan,
    describe_examples,
    object_content_id,
    tabulate,
)

_HIDDEN, _SIDE_FILE, NO_CLASS, _IMAGE_LIST = "hidden", "side_file", "no_class", "image_list"
# What Hugging Face's image folders keep their labels in.
_IMAGE_LISTS = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderLayout:
    """Which folders of a key mean what: (split/)(class/)file. Folders below a class belong to the class.

    Without classes, samples have no label, and those outside of the split folders no split.
    """

    splits_on_top: bool
    classes: frozenset[str]
    warnings: tuple[str, ...] = ()

    @property
    def num_folders(self) -> int:
        """The folders that every sample is in."""
        return self.splits_on_top + 1 if self.classes else 0


def find_layout(folders_in: ListFolders, labels: LabelRule, *, where: str) -> FolderLayout:
    """The layout of a root, from the names of its visible folders, and of those in each "<split>/".

    Split names are split folders only if all folders have one: a class may be called "train". Two of them
    beside other folders could mean both, and are a DataError where labels are read, as a class folder without a name.
    """

    def named_folders(parent: str) -> list[str]:
        names = folders_in(parent)
        if "" in names and labels is LabelRule.FOLDERS:
            raise DataError(
                "keys have a double slash there, so their class has no name",
                where=f"{where.rstrip('/')}/{parent}/",
                next_step="move these objects to keys with one slash, or read no labels with --set reading.labels=none",
            )
        return names

    folders = named_folders("")
    named = [name for name in folders if parse_split(name)]
    are_splits = bool(folders) and len(named) == len(folders)
    if len(named) > 1 and not are_splits and labels is LabelRule.FOLDERS:
        others = [name for name in folders if name not in named]
        raise DataError(
            f"the folders {', '.join(named)} look like splits, but beside them lie "
            f"{describe_examples(len(others), others)}: splits or classes?",
            where=where,
            next_step="move the other folders away, freeze a list with a `split` column, or read all files without"
            " labels with --set reading.labels=none",
        )
    classes: Iterable[str] = ()
    if labels is LabelRule.FOLDERS:
        classes = (
            (name for split in folders for name in named_folders(f"{split}/")) if are_splits else folders
        )
    taken_for = "a class" if labels is LabelRule.FOLDERS else "any folder"
    warnings = [f"the folder '{name}' was taken for {taken_for}, not for a split" for name in named]
    return FolderLayout(
        splits_on_top=are_splits, classes=frozenset(classes), warnings=() if are_splits else tuple(warnings)
    )


def read_folders(root: SourceRoot, labels: LabelRule) -> SourceScan:
    """All samples below a root. A sample's id is its key; any file in a class folder is a sample.

    With `labels` none, or without any class folder, the samples have no label, and none is left out for its folder.
    """
    store = root.store
    list_folders = cache(root.list_folders)
    layout = find_layout(partial(_visible_folders, list_folders), labels, where=store.root_uri)
    parts = map_listing(root, lambda objects: read_objects(store, objects, layout), list_folders)
    return join_parts(parts, layout)


def read_objects(
    store: ObjectStore, objects: Iterable[ObjectInfo], layout: FolderLayout
) -> tuple[pa.Table, Skips]:
    """The samples among some objects below a root, and what is no sample."""
    skips = Skips()
    samples = _samples_only(objects, layout, skips)
    return tabulate(_to_row(store, info, layout) for info in samples), skips


def join_parts(parts: Iterable[tuple[pa.Table, Skips]], layout: FolderLayout) -> SourceScan:
    """What `read_objects` said of all objects below a root, with warnings about what looks wrong."""
    skips = Skips()
    tables = [SOURCE_SCHEMA.empty_table()]
    for table, skipped in parts:
        tables.append(table)
        skips.update(skipped)
    samples = pa.concat_tables(tables)
    return SourceScan(
        samples=samples,
        skipped=dict(skips.counts),
        warnings=(
            *layout.warnings,
            *_explain(samples, skips, layout.classes),
            *_splits_below(samples, layout),
        ),
    )


def _visible_folders(list_folders: ListFolders, prefix: str) -> list[str]:
    return [name for name in list_folders(prefix) if not is_hidden(name)]


def _samples_only(objects: Iterable[ObjectInfo], layout: FolderLayout, skips: Skips) -> Iterator[ObjectInfo]:
    for info in objects:
        depth = info.key.count("/")
        if is_hidden(info.key):
            skips.add(_HIDDEN, info.key)
        elif depth == 0 and _is_side_file(info.key):
            skips.add(_SIDE_FILE, info.key)
        elif depth < layout.num_folders:
            skips.add(NO_CLASS, info.key)
        elif not layout.classes and info.key.rpartition("/")[2] in _IMAGE_LISTS:
            skips.add(_IMAGE_LIST, info.key)
        else:
            yield info


def _to_row(store: ObjectStore, info: ObjectInfo, layout: FolderLayout) -> SourceRow:
    folders = info.key.split("/")
    uri = store.uri(info.key)
    return SourceRow(
        sample_id=info.key,
        uri=uri,
        etag=info.etag,
        size_bytes=info.size_bytes,
        content_id=object_content_id(uri, info),
        checksum=info.checksum or None,
        label=folders[int(layout.splits_on_top)] if layout.classes else None,
        split=parse_split(folders[0]) if layout.splits_on_top and len(folders) > 1 else None,
    )


def _is_side_file(name: str) -> bool:
    return name.lower().endswith((".txt", ".md")) or name.upper() in {"LICENSE", "README"}


def _explain(samples: pa.Table, skips: Skips, classes: frozenset[str]) -> tuple[str, ...]:
    warnings = []
    if skips.counts[NO_CLASS]:
        warnings.append(f"files outside the class folders were left out: {skips.describe(NO_CLASS)}")
    if skips.counts[_IMAGE_LIST]:
        warnings.append(
            f"lists of these images were not read, nor the labels in them: {skips.describe(_IMAGE_LIST)};"
            " to have them, freeze the list in place of the folder"
        )
    empty = sorted(classes - set(samples["label"].unique().to_pylist()))
    if empty:
        warnings.append(f"class folders without a sample: {describe_examples(len(empty), empty)}")
    return tuple(warnings)


def _splits_below(samples: pa.Table, layout: FolderLayout) -> Iterator[str]:
    """A warning where folders inside of classes are named like splits, which only folders on top are."""
    if layout.splits_on_top or not layout.classes:
        return
    found = pc.extract_regex(samples["sample_id"], r"^(?P<folder>[^/]+/[^/]+)/")
    folders = pc.struct_field(found, "folder").unique().drop_null().to_pylist()
    named = sorted(folder for folder in folders if parse_split(folder.partition("/")[2]))
    if named:
        (only, *others) = layout.classes
        advice = f"did you mean the folder {only} inside of this source?"
        if others:
            advice = "put the splits on top, as SPLIT/CLASS/FILE, or freeze a list with a `split` column"
        yield (
            f"folders inside of a class are named like splits, and are none: {describe_examples(len(named), named)};"
            f" {advice}"
        )
