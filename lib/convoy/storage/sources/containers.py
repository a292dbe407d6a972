"""What tar shards and parquet files share: found, read many at a time, and not read again."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from convoy.core.errors import DataError, ObjectNotFound
from convoy.core.records import Split
from convoy.core.splits import parse_split
from convoy.storage.manifests import Manifest, label_names
from convoy.storage.object_store import ObjectInfo, ObjectStore
from convoy.storage.sources.listing import NUM_THREADS, SourceRoot, is_hidden, map_listing
from convoy.storage.sources.rows import SOURCE_SCHEMA, Skips, describe_examples
from convoy.storage.stores import open_object

T = TypeVar("T")


class KnownContainers:
    """The rows of an earlier manifest by container and its version, so that only what is new is read.

    `skipped_in` counts by reason what of each container is in no row.
    """

    def __init__(self, manifest: Manifest | None = None) -> None:
        self._rows = SOURCE_SCHEMA.empty_table()
        self._runs: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
        self._uris: set[str] = set()
        self.skipped_in = {} if manifest is None else manifest.header.skipped_in
        if manifest is not None:
            self._index(manifest)

    def rows_of(self, uri: str, etag: str) -> pa.Table | None:
        """The rows of this version of a container, or None where they are not known."""
        runs = self._runs.get((uri, etag))
        return pa.concat_tables(self._rows.slice(start, length) for start, length in runs) if runs else None

    def has_other_version(self, uri: str, etag: str) -> bool:
        """Whether a container is known, but not in this version."""
        return (uri, etag) not in self._runs and uri in self._uris

    def _index(self, manifest: Manifest) -> None:
        rows = manifest.read_table()
        names = label_names(rows, manifest.classes)
        rows = rows.set_column(rows.schema.get_field_index("label"), "label", names)
        self._rows = rows.cast(SOURCE_SCHEMA)
        # Rows of a container lie together, as its key begins their ids; so there are few runs.
        start = 0
        encoded = pc.run_end_encode(rows["uri"].cast(pa.large_string()).combine_chunks())
        for uri, end in zip(encoded.values.to_pylist(), encoded.run_ends.to_pylist(), strict=True):
            if uri not in manifest.header.incomplete:
                self._runs[uri, rows["etag"][start].as_py()].append((start, end - start))
            start = end
        self._uris = {uri for uri, _ in self._runs}


def open_containers(root: SourceRoot, suffix: str, skips: Skips) -> tuple[ObjectStore, list[ObjectInfo]]:
    """The container at the root's URI and its folder's store; or the store of the root, and all containers below it.

    A container's key ends in `suffix`; other objects are counted in `skips`.
    """
    uri = root.store.root_uri
    if uri.lower().endswith(suffix):
        store, key = open_object(uri)
        with suppress(ObjectNotFound):
            return store, [store.head(key)]
    containers = []
    for found, skipped in map_listing(root, lambda objects: _choose(objects, suffix)):
        containers += found
        skips.update(skipped)
    return root.store, containers


def _choose(objects: Iterator[ObjectInfo], suffix: str) -> tuple[list[ObjectInfo], Skips]:
    found, skips = [], Skips()
    for info in objects:
        if is_hidden(info.key):
            skips.add("hidden", info.key)
        elif info.key.lower().endswith(suffix):
            found.append(info)
        else:
            skips.add(f"not_{suffix.removeprefix('.')}", info.key)
    return found, skips


def read_containers(containers: Sequence[ObjectInfo], read: Callable[[ObjectInfo], T]) -> Iterator[T]:
    """`read` of each container in their order, many at a time."""
    with ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="container") as pool:
        yield from pool.map(read, containers)


def with_splits(store: ObjectStore, containers: Sequence[ObjectInfo], tables: Sequence[pa.Table]) -> pa.Table:
    """The containers' rows with the split that each key names, such as train-00000-of-00005.parquet.

    Where no key names one, the split is null. Raises DataError if only some keys do, or one names two.
    """
    splits = [_split_of(info.key, store.uri(info.key)) for info in containers]
    unnamed = [info.key for info, split in zip(containers, splits, strict=True) if split is None]
    if unnamed and len(unnamed) < len(containers):
        raise DataError(
            f"only some files are named after a split, but not {describe_examples(len(unnamed), unnamed)}",
            where=store.root_uri,
            next_step="put train, val or test as a word into each name, or into none",
        )
    column = SOURCE_SCHEMA.get_field_index("split")
    return pa.concat_tables(
        rows.set_column(column, SOURCE_SCHEMA.field(column), pa.array([split] * rows.num_rows, pa.string()))
        for rows, split in zip(tables, splits, strict=True)
    )


def _split_of(key: str, uri: str) -> Split | None:
    named = {split for word in re.split(r"[^A-Za-z]+", key) if (split := parse_split(word))}
    if len(named) > 1:
        raise DataError(f"the name tells several splits: {', '.join(sorted(named))}", where=uri)
    return named.pop() if named else None
