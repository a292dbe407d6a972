"""Folders read like a bucket: their files in the order of the keys, as a stream."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path

from convoy.core.errors import StorageError
from convoy.storage.object_store import ObjectInfo

# Names that are ours and never objects: files being written, and locks.
PRIVATE_PREFIX = ".convoy-tmp-"

# Where a check of a volume puts what it finds: at the root of the volume, usually empty, and closed to all but root.
LOST_AND_FOUND = "lost+found"

# What the system says of a path that is no file or no folder.
ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)

# The folders that lead to a folder, from the top of the disk, and itself, each as (device, inode); None for one that is
# gone.
Chain = tuple[tuple[int, int] | None, ...]


def local_etag(status: os.stat_result) -> str:
    """The etag of a local file: "<size>-<modification time in ns>", both in hexadecimal."""
    return f"{status.st_size:x}-{status.st_mtime_ns:x}"


def walk(path: str, folder: str, chain: Chain, prefix: str, start_after: str) -> Iterator[ObjectInfo]:
    """The objects in the folder `path`, whose keys start with `folder`, in the order of their keys."""
    for name, entry in sorted_entries(path):
        key = folder + name
        if name.endswith("/"):
            overlaps = key.startswith(prefix) or prefix.startswith(key)
            is_behind = key < start_after and not start_after.startswith(key)
            if overlaps and not is_behind:
                yield from walk_into(entry, key, chain, prefix, start_after)
        elif key > start_after and key.startswith(prefix):
            try:
                status = entry.stat()
            except FileNotFoundError:
                continue
            yield ObjectInfo(key=key, size_bytes=status.st_size, etag=local_etag(status))


def walk_into(
    entry: os.DirEntry[str], folder: str, chain: Chain, prefix: str, start_after: str
) -> Iterator[ObjectInfo]:
    """The same for a folder that was found in another, unless a link to it closes a circle."""
    entered = folder_id(entry.path)
    if entered not in chain:
        yield from walk(entry.path, folder, (*chain, entered), prefix, start_after)


@dataclass(slots=True)
class UnfollowedLinks:
    """The keys, in any order, of links that a walk leaves out.

    `dangling` ones lead nowhere, `circular` ones to a folder that they lie in, be it above the root of the walk.
    """

    dangling: list[str] = field(default_factory=list)
    circular: list[str] = field(default_factory=list)

    def look_into(self, path: str, folder: str, chain: Chain) -> None:
        """Add the links in the folder `path` and below."""
        try:
            entries = _entries(path)
        except ABSENT:
            return
        for entry in entries:
            key = folder + entry.name
            if entry.is_symlink() and not os.path.exists(entry.path):
                self.dangling.append(key)
            elif entry.is_dir():
                entered = folder_id(entry.path)
                if entered not in chain:
                    self.look_into(entry.path, f"{key}/", (*chain, entered))
                elif entry.is_symlink():
                    self.circular.append(key)


def sorted_entries(path: str) -> list[tuple[str, os.DirEntry[str]]]:
    """The files and folders in a folder in the order of their keys; folders get a '/' at the end.

    The '/' makes the order of a walk the order of the keys: 'a-b' < 'a/b', though 'a' < 'a-b'. Python
    compares strings by code points, and that is the order of their UTF-8 bytes.
    """
    try:
        named = [
            (_name(entry), entry) for entry in _entries(path) if not entry.name.startswith(PRIVATE_PREFIX)
        ]
    except ABSENT:
        return []
    return sorted(((name, entry) for name, entry in named if name), key=itemgetter(0))


def _entries(path: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as scan:
            return list(scan)
    except PermissionError:
        if os.path.basename(path) == LOST_AND_FOUND:
            return []
        raise


def _name(entry: os.DirEntry[str]) -> str:
    """The entry's name, with a '/' if it is a folder; empty if it is neither a folder nor a file."""
    try:
        entry.name.encode()
        suffix = "/" if entry.is_dir() else ""
        return entry.name + suffix if suffix or entry.is_file() else ""
    except UnicodeEncodeError:
        raise StorageError(
            "the file's name is not UTF-8", where=repr(entry.path), next_step="rename the file"
        ) from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            return ""
        raise


def folder_id(path: str) -> tuple[int, int] | None:
    """What tells a folder from all others, whatever links lead to it; None if there is none at the path."""
    try:
        status = os.stat(path)
    except ABSENT:
        return None
    return status.st_dev, status.st_ino


def chain_above(path: str) -> Chain:
    """The folders that hold a folder, whatever link it is named through: no link leads out of it and into them."""
    return tuple(folder_id(str(above)) for above in reversed(Path(os.path.realpath(path)).parents))
