"""Listing a whole store in parallel, by key ranges between its folders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from convoy.storage.object_store import ObjectInfo, ObjectStore

NUM_THREADS = 16
_MOST_RANGES = 16 * NUM_THREADS
_SIDE_NAMES = frozenset({"thumbs.db", "desktop.ini", "_success", "__macosx"})
_FOLDER_MARKER = "_$folder$"

T = TypeVar("T")


def map_listing(store: ObjectStore, read: Callable[[Iterator[ObjectInfo]], T]) -> Iterator[T]:
    """`read` of the objects of each key range, in the order of the ranges, which together hold all objects.

    Ranges run from folder to folder, so that a listing of 10^6 objects is many short ones at a time.
    """
    starts = ["", *_folder_keys(store)]
    stops = [*starts[1:], None]
    with ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="list") as pool:
        yield from pool.map(lambda start, stop: read(_list_range(store, start, stop)), starts, stops)


def is_hidden(key: str) -> bool:
    """Whether a key is a hidden file or folder, a marker, or what a desktop leaves behind."""
    names = key.split("/")
    if names[-1].endswith(_FOLDER_MARKER):
        return True
    return any(name.startswith(".") or name.lower() in _SIDE_NAMES for name in names)


def visible_folders(store: ObjectStore, prefix: str = "") -> list[str]:
    """The names of the folders directly below a prefix, without hidden ones."""
    return [name for name in store.list_folders(prefix) if not is_hidden(name)]


def _folder_keys(store: ObjectStore) -> list[str]:
    """The starts of enough folders to keep all threads busy, sorted: of the first level, or of two levels."""
    folders = [f"{name}/" for name in store.list_folders()]
    if len(folders) < NUM_THREADS:
        folders += [f"{folder}{name}/" for folder in folders for name in store.list_folders(folder)]
    # Each is a listing of its own, and on a disk a walk through its parent.
    return sorted(folders)[:: max(1, len(folders) // _MOST_RANGES)]


def _list_range(store: ObjectStore, start: str, stop: str | None) -> Iterator[ObjectInfo]:
    for info in store.list_objects(start_after=start):
        # The next range starts behind `stop`, which may be the key of an object.
        if stop is not None and info.key > stop:
            return
        yield info
