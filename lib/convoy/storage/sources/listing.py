"""Listing a whole store in parallel, by key ranges between its folders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import TypeVar

from convoy.storage.object_store import ObjectInfo, ObjectStore

NUM_THREADS = 16
_MOST_RANGES = 16 * NUM_THREADS
_SIDE_NAMES = frozenset({"thumbs.db", "desktop.ini", "_success", "__macosx"})
_FOLDER_MARKER = "_$folder$"

T = TypeVar("T")
# As ObjectStore.list_folders.
ListFolders = Callable[[str], list[str]]


def map_listing(
    store: ObjectStore, read: Callable[[Iterator[ObjectInfo]], T], list_folders: ListFolders | None = None
) -> Iterator[T]:
    """`read` of the objects of each key range, in the order of the ranges, which together hold all objects.

    Ranges run from folder to folder, so that a listing of 10^6 objects is many short ones at a time. To name the
    folders of a prefix, a store passes over all its objects: who has asked before gives its own `list_folders`.
    """
    with ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="list") as pool:
        starts = ["", *_folder_keys(list_folders or store.list_folders, pool)]
        stops = [*starts[1:], None]
        yield from pool.map(lambda start, stop: read(_list_range(store, start, stop)), starts, stops)


def is_hidden(key: str) -> bool:
    """Whether a key is a hidden file or folder, a marker, or what a desktop leaves behind."""
    names = key.split("/")
    if names[-1].endswith(_FOLDER_MARKER):
        return True
    return any(name.startswith(".") or name.lower() in _SIDE_NAMES for name in names)


def _folder_keys(list_folders: ListFolders, pool: Executor) -> list[str]:
    """The starts of enough folders to keep all threads busy, sorted: of the first level, or of two levels."""
    folders = [f"{name}/" for name in list_folders("")]
    if len(folders) < NUM_THREADS:
        below = zip(folders, pool.map(list_folders, folders), strict=True)
        folders += [f"{folder}{name}/" for folder, names in below for name in names]
    # Each is a listing of its own, and on a disk a walk through its parent.
    return sorted(folders)[:: max(1, len(folders) // _MOST_RANGES)]


def _list_range(store: ObjectStore, start: str, stop: str | None) -> Iterator[ObjectInfo]:
    for info in store.list_objects(start_after=start):
        # The next range starts behind `stop`, which may be the key of an object.
        if stop is not None and info.key > stop:
            return
        yield info
