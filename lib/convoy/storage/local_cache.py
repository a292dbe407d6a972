"""Encoded images on a node's own disk, so that an epoch after the first asks object storage for less."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import Field

from convoy.core.config import StrictModel
from convoy.core.fingerprints import DIGEST_BYTES, digest_bytes
from convoy.storage.local_walk import PRIVATE_PREFIX

# In the folder: how many bytes its files have, and when they were last counted, in seconds since 1970.
_USAGE_FILE = "usage"
_USAGE = struct.Struct("<qd")
# A count serves the processes that open the cache within a minute of it, and all others no longer than an hour.
_OPENING_S = 60.0
_RECOUNT_AFTER_S = 3600.0
_LEFTOVER_AFTER_S = 86_400.0
# A file's modification time says when it was last used, to the hour.
_USE_NOTED_AFTER_S = 3600.0
_UNUSED_AFTER_S = 2 * 86_400.0
# With less room than such a share of its bytes a cache counts as full.
_LITTLE_ROOM = 0.1
# Of a disk's bytes so many stay free: Ray, whose folders are mostly on the same disk, spills nothing more to one that
# is 95 % full, and whatever else is there grows while an epoch is read.
_FREE_SHARE_OF_DISK = 0.1
_DISK_IS_SHORT = f"nothing is admitted while that leaves less than {_FREE_SHARE_OF_DISK:.0%} of the disk free"


class LocalCacheOptions(StrictModel):
    """Where a node keeps the bytes of images that are needed again, and how many bytes at most.

    Without a `folder` that is in the node's own folder for temporary files, one for each user; where that is another
    user's, or others may write to it, it is not used. A folder that is named is trusted.
    """

    folder: str | None
    max_bytes: int = Field(ge=0)


@dataclass(slots=True, kw_only=True)
class CacheCounts:
    """What one process did with a cache. `notes` counts what went wrong, by reason."""

    hits: int = 0
    misses: int = 0
    admitted_bytes: int = 0
    notes: Counter[str] = field(default_factory=Counter)


class LocalImageCache:
    """Encoded images by the content id of their manifest; all processes of a node may share one folder.

    What fits is admitted, until the files have `max_bytes` or the disk has no more than a tenth free, and nothing in
    use is ever evicted. For training reads all its images in the same cycle, epoch by epoch: the image that was not
    used for the longest time, which others would evict, is the one that is needed next, and a cache that is a little
    too small would never hit. Only where room for less than a tenth of `max_bytes` is left, what nobody has used for
    two days goes when the files are counted: the images of trainings of the past.

    A process may be killed at any moment: files appear whole and hold a digest, so bytes that are not the
    admitted ones are a miss. A cache that cannot be written (a full disk, no permission) admits nothing more
    in this process, notes it, and still answers from what it has.

    Cheap to make, thread-safe, and pickles, without its counts. The folder is made, with access for its owner
    only, when the first image is admitted. Where none is named, one that other users can write to is no cache: a file's
    digest tells damage, not who wrote it.
    """

    def __init__(self, folder: str | None, max_bytes: int) -> None:
        self._named_folder = folder
        self.folder = os.path.abspath(folder or _default_folder())
        self.max_bytes = max_bytes
        self._counts = CacheCounts()
        self._counting = threading.Lock()
        self._is_admitting = True
        # Volumes of a cluster are often root's, so who may write to a folder that is named is not asked.
        self._is_trusted = folder is not None
        self._opened_unix_s = time.time()

    @classmethod
    def of(cls, options: LocalCacheOptions | None) -> LocalImageCache | None:
        """The cache that a worker is told to have, if any."""
        return None if options is None else cls(options.folder, options.max_bytes)

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalImageCache, (self._named_folder, self.max_bytes)

    @property
    def counts(self) -> CacheCounts:
        """What this process did so far; a copy."""
        with self._counting:
            return replace(self._counts, notes=self._counts.notes.copy())

    def get(self, content_id: bytes) -> bytes | None:
        """The image, or None; counts a hit or a miss. A damaged file is deleted."""
        path = self._path(content_id)
        try:
            self._require_trusted()
            with open(path, "rb") as file:
                expected, data = file.read(DIGEST_BYTES), file.read()
                last_used_unix_s = os.fstat(file.fileno()).st_mtime
        except OSError:
            self._count(misses=1)
            return None
        if _digest(content_id, data) != expected:
            with suppress(OSError):
                os.unlink(path)
            self._count(misses=1, note="a damaged file was deleted")
            return None
        if last_used_unix_s < time.time() - _USE_NOTED_AFTER_S:
            with suppress(OSError):
                os.utime(path)
        self._count(hits=1)
        return data

    def find(self, content_id: bytes) -> int | None:
        """The size in bytes of an image that `get` will most likely return, or None, which counts as a miss."""
        try:
            self._require_trusted()
            return max(0, os.stat(self._path(content_id)).st_size - DIGEST_BYTES)
        except OSError:
            self._count(misses=1)
            return None

    def offer(self, content_id: bytes, data: bytes) -> None:
        """Admit an image that is not there, if it fits."""
        if not self._is_admitting:
            return
        try:
            self._admit(content_id, data)
        except OSError as error:
            self._is_admitting = False
            self._count(note=f"nothing more is admitted: {error.strerror or error}")

    def _admit(self, content_id: bytes, data: bytes) -> None:
        path = self._path(content_id)
        if not self._reserve(path, DIGEST_BYTES + len(data)):
            return
        _write_whole(path, _digest(content_id, data), data)
        self._count(admitted_bytes=len(data))

    def _reserve(self, path: str, size_bytes: int) -> bool:
        """Count a file before it is written, so that a kill leaves too high a count, never too low a one."""
        with self._usage() as usage:
            oldest_unix_s = max(self._opened_unix_s - _OPENING_S, time.time() - _RECOUNT_AFTER_S)
            used_bytes, counted_unix_s = _read_usage(usage, oldest_unix_s) or self._recount(usage)
            is_wanted = used_bytes + size_bytes <= self.max_bytes and not os.path.exists(path)
            has_space = size_bytes <= _spare_bytes(usage)
            if is_wanted and not has_space:
                self._count(note=_DISK_IS_SHORT)
            if is_wanted and has_space:
                _write_usage(usage, used_bytes + size_bytes, counted_unix_s)
        return is_wanted and has_space

    @contextmanager
    def _usage(self) -> Iterator[int]:
        """The descriptor of the usage file, locked; the system frees the lock if the process dies."""
        os.makedirs(self.folder, mode=0o700, exist_ok=True)
        self._require_trusted()
        descriptor = os.open(os.path.join(self.folder, _USAGE_FILE), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)

    def _require_trusted(self) -> None:
        """Raise PermissionError where other users can put a file in the place of an image."""
        if self._is_trusted:
            return
        # In a folder for all users the name may be another's link to a folder of ours.
        name, folder = os.lstat(self.folder), os.stat(self.folder)
        if {name.st_uid, folder.st_uid} != {os.geteuid()}:
            raise PermissionError(errno.EPERM, f"{self.folder} belongs to another user")
        if folder.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise PermissionError(errno.EPERM, f"others may write to {self.folder}")
        self._is_trusted = True

    def _recount(self, usage: int) -> tuple[int, float]:
        """Count the bytes in the folder, and remove what writers left that were killed long ago, and what is unused.

        What others are writing at this moment may be missed.
        """
        now_unix_s = time.time()
        begun_unix_s = now_unix_s - _LEFTOVER_AFTER_S
        used_bytes = self._remove_and_count(begun_unix_s)
        if min(self.max_bytes - used_bytes, _spare_bytes(usage)) < _LITTLE_ROOM * self.max_bytes:
            used_bytes = self._remove_and_count(begun_unix_s, now_unix_s - _UNUSED_AFTER_S)
        return _write_usage(usage, used_bytes, now_unix_s)

    def _remove_and_count(self, begun_unix_s: float, used_unix_s: float = 0.0) -> int:
        """The bytes that stay without unfinished files that were begun before, and images last used before."""
        kept_bytes = 0
        for entry in _files_below(self.folder):
            if entry.name == _USAGE_FILE:
                continue
            with suppress(FileNotFoundError):
                status = entry.stat(follow_symlinks=False)
                oldest_unix_s = begun_unix_s if entry.name.startswith(PRIVATE_PREFIX) else used_unix_s
                if status.st_mtime < oldest_unix_s:
                    os.unlink(entry.path)
                else:
                    kept_bytes += status.st_size
        return kept_bytes

    def _path(self, content_id: bytes) -> str:
        name = content_id.hex()
        return os.path.join(self.folder, name[:2], name[2:4], name)

    def _count(self, *, hits: int = 0, misses: int = 0, admitted_bytes: int = 0, note: str = "") -> None:
        with self._counting:
            self._counts.hits += hits
            self._counts.misses += misses
            self._counts.admitted_bytes += admitted_bytes
            if note:
                self._counts.notes[note] += 1


def _default_folder() -> str:
    # Users of a node share its folder for temporary files, but not the images.
    return os.path.join(tempfile.gettempdir(), f"convoy-images-{os.geteuid()}")


def _digest(content_id: bytes, data: bytes) -> bytes:
    # With the id, because a disk may after a power cut show one file's blocks in another.
    return digest_bytes(content_id + digest_bytes(data))


def _read_usage(usage: int, oldest_unix_s: float) -> tuple[int, float] | None:
    """The bytes in use and when they were counted; None if there is no count as young as that."""
    stored = os.pread(usage, _USAGE.size, 0)
    if len(stored) < _USAGE.size:
        return None
    used_bytes, counted_unix_s = _USAGE.unpack(stored)
    return (used_bytes, counted_unix_s) if oldest_unix_s <= counted_unix_s <= time.time() else None


def _write_usage(usage: int, used_bytes: int, counted_unix_s: float) -> tuple[int, float]:
    os.pwrite(usage, _USAGE.pack(used_bytes, counted_unix_s), 0)
    return used_bytes, counted_unix_s


def _spare_bytes(usage: int) -> float:
    """What may still be written to the disk of a file; below 0 where others have taken of the share that stays free."""
    disk = os.fstatvfs(usage)
    return (disk.f_bavail - _FREE_SHARE_OF_DISK * disk.f_blocks) * disk.f_frsize


def _write_whole(path: str, header: bytes, data: bytes) -> None:
    """Write a file so that its name never shows a part of it; not synced, as the header tells damage."""
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f"{PRIVATE_PREFIX}{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as file:
            file.write(header)
            file.write(data)
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def _files_below(folder: str) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _files_below(entry.path)
            else:
                yield entry
