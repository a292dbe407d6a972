"""Listing a whole source in parallel, by key ranges between its folders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from os.path import realpath
from typing import TypeVar

from convoy.core.errors import ConfigError
from convoy.storage.local_walk import LOST_AND_FOUND
from convoy.storage.object_store import ObjectInfo, ObjectStore
from convoy.storage.stores import open_store

NUM_THREADS = 16
_MOST_RANGES = 16 * NUM_THREADS
_SIDE_NAMES = frozenset({"thumbs.db", "desktop.ini", "_success", "__macosx", LOST_AND_FOUND})
_FOLDER_MARKER = "_$folder$"

T = TypeVar("T")
# As ObjectStore.list_folders.
ListFolders = Callable[[str], list[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRoot:
    """A root below which samples lie. What is below `workspace_key` (such as "workspace/") is Convoy's own, and no part
    of the source; "" where the workspace lies elsewhere.
    """

    store: ObjectStore
    workspace_key: str = ""

    @classmethod
    def open(cls, uri: str, workspace: str = "") -> SourceRoot:
        """The root at a URI, for a workspace at another; ConfigError where they are the same."""
        store = open_store(uri)
        return cls(store=store, workspace_key=_workspace_key(store.root_uri, workspace))

    @property
    def warnings(self) -> tuple[str, ...]:
        """That the workspace was left out, where there is one."""
        if not self.workspace_key:
            return ()
        return (f"the workspace lies in the source, and was left out: {self.workspace_key}",)

    def holds(self, key: str) -> bool:
        """Whether a key is a part of the source."""
        return not self.workspace_key or not key.startswith(self.workspace_key)

    def list_objects(self, *, start_after: str = "") -> Iterator[ObjectInfo]:
        """As ObjectStore."""
        return (info for info in self.store.list_objects(start_after=start_after) if self.holds(info.key))

    def list_folders(self, prefix: str = "") -> list[str]:
        """As ObjectStore: a folder with nothing but the workspace in it is left out too."""
        names = self.store.list_folders(prefix)
        return [name for name in names if not self._leads_to_workspace_only(f"{prefix}{name}/")]

    def _leads_to_workspace_only(self, folder: str) -> bool:
        if not self.holds(folder):
            return True
        if not self.workspace_key.startswith(folder):
            return False
        return not any(self.holds(info.key) for info in self.store.list_objects(folder))


def map_listing(
    root: SourceRoot, read: Callable[[Iterator[ObjectInfo]], T], list_folders: ListFolders | None = None
) -> Iterator[T]:
    """`read` of the objects of each key range, in the order of the ranges, which together hold all of the source.

    Ranges run from folder to folder, so that a listing of 10^6 objects is many short ones at a time. To name the
    folders of a prefix, a store passes over all its objects: who has asked before gives its own `list_folders`.
    """
    with ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="list") as pool:
        starts = ["", *_folder_keys(list_folders or root.list_folders, pool)]
        stops = [*starts[1:], None]
        yield from pool.map(lambda start, stop: read(_list_range(root, start, stop)), starts, stops)


def is_hidden(key: str) -> bool:
    """Whether a key is a hidden file or folder, a marker, or what a desktop or a file system leaves behind."""
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


def _list_range(root: SourceRoot, start: str, stop: str | None) -> Iterator[ObjectInfo]:
    for info in root.list_objects(start_after=start):
        # The next range starts behind `stop`, which may be the key of an object.
        if stop is not None and info.key > stop:
            return
        yield info


def _workspace_key(source: str, workspace: str) -> str:
    if not workspace:
        return ""
    if workspace == source:
        raise ConfigError(
            "the source is the workspace itself, whose files are no samples",
            where=source,
            next_step="name the folder of the images, or another workspace",
        )
    below = f"{source.rstrip('/')}/"
    if workspace.startswith(below):
        return f"{workspace.removeprefix(below)}/"
    # On a disk either may be named through a link.
    real = [uri if uri.startswith("s3://") else realpath(uri) for uri in (source, workspace)]
    return "" if real == [source, workspace] else _workspace_key(*real)
