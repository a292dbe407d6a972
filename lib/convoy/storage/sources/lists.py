"""Samples named in a list; sizes and versions come from the files, or from listing the folders of a bucket."""

from __future__ import annotations

import posixpath
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from urllib.parse import unquote

from convoy.core.batching import batched
from convoy.core.errors import ObjectNotFound
from convoy.storage.local_store import LocalStore
from convoy.storage.object_store import ObjectInfo, ObjectStore
from convoy.storage.sources.list_files import ListedSample, read_listed_samples
from convoy.storage.sources.listing import NUM_THREADS
from convoy.storage.sources.parquets import image_columns
from convoy.storage.sources.rows import (
    BadRows,
    LabelRule,
    ReadingOptions,
    SourceRow,
    SourceScan,
    object_content_id,
    tabulate,
)
from convoy.storage.stores import open_object, open_store

# A request lists 1,000 objects in about the time of two HEADs. So a listing that has passed this many objects
# for each one that is wanted has cost as much as asking for them one by one, and that is then done.
_OBJECTS_LISTED_PER_SAMPLE = 500
_FILES_PER_CALL = 1000


def read_list(uri: str, options: ReadingOptions) -> SourceScan:
    """All samples of a list (see `read_listed_samples`). A sample's id is its `id`, else its path as written.

    A relative path begins at `images_root`, else at the list's folder; a file:// URI is percent-decoded. Raises one
    DataError for all rows that cannot be used: unreadable, a missing file, an id twice, no label or split where others
    have one, no such split.
    """
    store, key = open_object(uri)
    bad_rows = BadRows(store.uri(key))
    listed = read_listed_samples(
        store,
        key,
        bad_rows,
        label_column=options.label_column,
        with_labels=options.labels is not LabelRule.NONE,
    )
    samples = list(listed)
    # A split may be unlabelled, as that of a competition's test.
    _require_all_or_none(samples, "label", lambda sample: sample.split, bad_rows)
    _require_all_or_none(samples, "split", lambda _: None, bad_rows)
    root = open_store(options.images_root).root_uri if options.images_root else store.root_uri
    uris = [_resolve(root, sample.path) for sample in samples]
    found = find_objects(uris)
    rows = tabulate(_join(samples, uris, found, bad_rows))
    if samples and not found and (columns := _binary_columns(store, key)):
        bad_rows.raise_any(
            "correct these rows, or, if the list itself holds the images in a binary column"
            f" ({', '.join(columns)}), name that with reading.image_column"
        )
    bad_rows.raise_any()
    return SourceScan(samples=rows)


def _require_all_or_none(
    samples: Sequence[ListedSample],
    column: str,
    group_of: Callable[[ListedSample], str | None],
    bad_rows: BadRows,
) -> None:
    """Note the rows without a value of a column in which others of their group have one."""
    has_value = {group_of(sample) for sample in samples if getattr(sample, column) is not None}
    for sample in samples:
        if getattr(sample, column) is None and (group := group_of(sample)) in has_value:
            of_group = "" if group is None else f" of {group}"
            bad_rows.add(sample.line, f"no {column}, though other rows{of_group} have one")


def find_objects(uris: Iterable[str]) -> dict[str, ObjectInfo]:
    """What is known of each object, by URI; objects that do not exist are missing.

    Of a bucket each folder is listed once, and single objects are asked for only where they lie far apart. Of local
    files each is asked for: that costs no more than its part of a listing, and needs no rights but its own.
    """
    keys_by_root: dict[str, set[str]] = defaultdict(set)
    for uri in uris:
        root = _bucket(uri)
        keys_by_root[root].add(uri.removeprefix(root).removeprefix("/"))
    found: dict[str, ObjectInfo] = {}
    with ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="list") as pool:
        for root, keys in keys_by_root.items():
            store = open_store(root)
            if isinstance(store, LocalStore):
                groups = pool.map(store.find, batched(sorted(keys), _FILES_PER_CALL))
            else:
                groups = pool.map(partial(_find_in_folder, store), _by_folder(keys))
            for infos in groups:
                found.update((store.uri(info.key), info) for info in infos)
    return found


def _binary_columns(store: ObjectStore, key: str) -> list[str]:
    return image_columns(store.open_parquet(key).schema_arrow) if key.lower().endswith(".parquet") else []


def _resolve(root: str, path: str) -> str:
    if path.startswith("s3://"):
        return path
    if path.startswith("file://"):
        path = unquote(path.removeprefix("file://"))
    if root.startswith("s3://") and not path.startswith("/"):
        return f"{root}/{path.removeprefix('./')}"
    return posixpath.normpath(posixpath.join(root, path))


def _bucket(uri: str) -> str:
    """The store that all objects near by share: "s3://bucket", or "/" for a local path."""
    return "/".join(uri.split("/", 3)[:3]) if uri.startswith("s3://") else "/"


def _by_folder(keys: set[str]) -> list[list[str]]:
    """The keys sorted and grouped by folder; the keys of a folder below another with keys join that one."""
    by_folder: dict[str, list[str]] = {}
    for key in sorted(keys, key=lambda key: (key.count("/"), key)):
        folder = own_folder = _parent(key)
        while folder and folder not in by_folder:
            folder = _parent(folder)
        by_folder.setdefault(folder if folder in by_folder else own_folder, []).append(key)
    return [sorted(group) for group in by_folder.values()]


def _parent(key: str) -> str:
    return key.rpartition("/")[0]


def _find_in_folder(store: ObjectStore, wanted: list[str]) -> list[ObjectInfo]:
    """The objects of the sorted keys `wanted`, which share a folder."""
    left = set(wanted)
    found: list[ObjectInfo] = []
    folder = _parent(posixpath.commonprefix([wanted[0], wanted[-1]]))
    prefix = f"{folder}/" if folder else ""
    # Without its last character the first key lies just before itself.
    listing = store.list_objects(prefix, start_after=wanted[0][:-1])
    for num_listed, info in enumerate(listing):
        if not left or info.key > wanted[-1]:
            return found
        if num_listed >= _OBJECTS_LISTED_PER_SAMPLE * len(wanted):
            return [*found, *(info for key in sorted(left) for info in _head(store, key))]
        if info.key in left:
            left.remove(info.key)
            found.append(info)
    return found


def _head(store: ObjectStore, key: str) -> list[ObjectInfo]:
    try:
        return [store.head(key)]
    except ObjectNotFound:
        return []


def _join(
    samples: Sequence[ListedSample], uris: Sequence[str], found: dict[str, ObjectInfo], bad_rows: BadRows
) -> Iterator[SourceRow]:
    for sample, uri in zip(samples, uris, strict=True):
        info = found.get(uri)
        if info is None:
            bad_rows.add(sample.line, f"{uri} does not exist")
            continue
        yield SourceRow(
            sample_id=sample.sample_id,
            uri=uri,
            etag=info.etag,
            size_bytes=info.size_bytes,
            content_id=object_content_id(uri, info, checksum=sample.checksum),
            checksum=sample.checksum or info.checksum or None,
            label=sample.label,
            split=sample.split,
            weight=sample.weight,
        )
