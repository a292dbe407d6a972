"""An object store in a local or shared folder."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from convoy.core.errors import (
    AccessDenied,
    ConditionalWriteUnsupported,
    ObjectNotFound,
    ObjectUnreadable,
    StorageError,
    StorageFull,
    StoreUnavailable,
)
from convoy.storage.local_walk import (
    ABSENT,
    PRIVATE_PREFIX,
    Chain,
    UnfollowedLinks,
    chain_above,
    folder_id,
    local_etag,
    sorted_entries,
    walk,
    walk_into,
)
from convoy.storage.object_store import Blob, ObjectInfo, settle_refusal
from convoy.storage.parquet_files import open_parquet_file

LOCK_NAME = f"{PRIVATE_PREFIX}lock"

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# A path that leads in a circle, or with a name that is too long for any file.
_NO_PATH = (errno.ELOOP, errno.ENAMETOOLONG)
_NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


@dataclass(frozen=True, slots=True)
class LocalStore:
    """An ObjectStore (see there) in the folder `root`, which is made when the first object is written.

    Every object is a file. Its etag is "<size>-<modification time in ns>", both in hexadecimal; there is no
    checksum. Links to files and folders are followed, but not in a circle, nor to a folder that holds the root; what
    is neither a file nor a folder is not listed. Conditional writes exclude each other, on one machine or over a
    network file system with locks; an unconditional `put` of the same key at the same time is not excluded.
    """

    root: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", os.path.abspath(self.root))

    @property
    def root_uri(self) -> str:
        """The absolute path of the root."""
        return self.root

    @property
    def endpoint_url(self) -> str:
        """As in ObjectStore: a folder has no server."""
        return ""

    @property
    def num_retries(self) -> int:
        """As in ObjectStore: a folder has no requests."""
        return 0

    def uri(self, key: str) -> str:
        """The absolute path of a key."""
        return f"{self.root.rstrip('/')}/{key}"

    def list_objects(self, prefix: str = "", *, start_after: str = "") -> Iterator[ObjectInfo]:
        """As in ObjectStore. Holds the names of one folder a level in memory, not those of the whole tree."""
        folder = prefix[: prefix.rfind("/") + 1]
        path = self._folder_path(folder)
        with _reading(path):
            yield from walk(path, folder, self._chain(folder), prefix, start_after)

    def list_folders(self, prefix: str = "") -> list[str]:
        """As in ObjectStore."""
        path = self._folder_path(prefix)
        with _reading(path):
            chain = self._chain(prefix)
            return sorted(
                name.removesuffix("/")
                for name, entry in sorted_entries(path)
                if name.endswith("/") and any(walk_into(entry, prefix + name, chain, "", ""))
            )

    def find_unfollowed_links(self) -> UnfollowedLinks:
        """The links that `list_objects` leaves out."""
        links = UnfollowedLinks()
        with _reading(self.root):
            links.look_into(self.root, "", self._chain(""))
        return links

    def list_unfinished(self, older_than_s: float) -> list[ObjectInfo]:
        """Files that writers left half done when they were killed, by their age, in any order; listings hide them."""
        oldest_unix_s = time.time() - older_than_s
        found = []
        with _reading(self.root):
            for path in Path(self.root).rglob(f"{PRIVATE_PREFIX}*"):
                with suppress(*ABSENT):
                    status = path.stat()
                    if path.name != LOCK_NAME and status.st_mtime < oldest_unix_s:
                        key = str(path.relative_to(self.root))
                        found.append(ObjectInfo(key=key, size_bytes=status.st_size, etag=local_etag(status)))
        return found

    def delete_unfinished(self, unfinished: Iterable[ObjectInfo]) -> None:
        """Delete what `list_unfinished` found."""
        for info in unfinished:
            path = self.uri(info.key)
            with _writing(path), suppress(*ABSENT):
                os.unlink(path)
                self._prune(os.path.dirname(path))

    def head(self, key: str) -> ObjectInfo:
        """As in ObjectStore."""
        path = self._path(key)
        with _reading(path):
            status = _file_status(path)
        return ObjectInfo(key=key, size_bytes=status.st_size, etag=local_etag(status))

    def find(self, keys: Iterable[str]) -> list[ObjectInfo]:
        """The objects of those keys that name a file, whatever else their folders hold."""
        return [info for key in keys if (info := self._find(key)) is not None]

    def get(
        self, key: str, *, byte_range: tuple[int, int] | None = None, wanted_etag: str | None = None
    ) -> Blob:
        """As in ObjectStore."""
        path = self._path(key)
        with _reading(path), open(path, "rb") as file:
            status = os.fstat(file.fileno())
            if wanted_etag not in (None, local_etag(status)):
                return Blob(data=b"", etag=local_etag(status))
            first, num_bytes = byte_range or (0, status.st_size)
            if first + num_bytes > status.st_size:
                raise StorageError(
                    f"bytes {first} to {first + num_bytes} lie beyond the end at {status.st_size}", where=path
                )
            if first:
                file.seek(first)
            data = file.read(num_bytes)
        if len(data) != num_bytes:
            raise StoreUnavailable("the file was cut short while it was read", where=path)
        return Blob(data=data, etag=local_etag(status))

    def put(self, key: str, data: bytes) -> str:
        """As in ObjectStore."""
        path = self._path(key)
        with _writing(path), _written_aside(path, data) as (temporary, etag):
            os.replace(temporary, path)
        return etag

    def put_if_absent(self, key: str, data: bytes) -> str:
        """As in ObjectStore."""
        path = self._path(key)
        with _writing(path), _written_aside(path, data) as (temporary, etag):
            try:
                _link(temporary, path)
            except FileExistsError:
                return settle_refusal(self, key, data)
        return etag

    def put_if_match(self, key: str, data: bytes, *, etag: str) -> str:
        """As in ObjectStore."""
        path = self._path(key)
        with _writing(path), _written_aside(path, data) as (temporary, new_etag), _folder_lock(path):
            if _current_etag(path) != etag:
                return settle_refusal(self, key, data)
            os.replace(temporary, path)
        return new_etag

    def delete(self, keys: Iterable[str]) -> None:
        """As in ObjectStore. Folders that become empty go too."""
        for key in keys:
            path = self._path(key)
            with _writing(path), suppress(*ABSENT):
                os.unlink(path)
                self._prune(os.path.dirname(path))

    def clock_skew_s(self) -> float:
        """As in ObjectStore: a folder has the clock of its machine."""
        return 0.0

    def open_parquet(self, key: str) -> Any:
        """As in ObjectStore."""
        path = self._path(key)
        with _reading(path):
            _file_status(path)
            # Not memory-mapped: a mapped file that is cut short kills the process instead of raising.
            return open_parquet_file(path, where=path)

    def _find(self, key: str) -> ObjectInfo | None:
        path = self.uri(key)
        with _reading(path):
            try:
                status = os.stat(path)
            except (*ABSENT, ValueError):  # ValueError: no name has a NUL, or half of a character
                return None
            except OSError as error:
                if error.errno in _NO_PATH:
                    return None
                raise
        is_file = stat.S_ISREG(status.st_mode)
        return ObjectInfo(key=key, size_bytes=status.st_size, etag=local_etag(status)) if is_file else None

    def _path(self, key: str) -> str:
        names = key.split("/")
        if any(name in {"", ".", ".."} or name.startswith(PRIVATE_PREFIX) or "\0" in name for name in names):
            raise StorageError(
                "the key cannot name a file below the root",
                where=f"{key!r} in {self.root}",
                next_step="remove empty, '.' and '..' parts from the key",
            )
        return self.uri(key)

    def _folder_path(self, folder: str) -> str:
        return self._path(folder.removesuffix("/")) if folder else self.root

    def _chain(self, folder: str) -> Chain:
        """The folders above the root, and from it to `folder`, which is empty or ends in '/'."""
        paths = accumulate(folder.split("/")[:-1], os.path.join, initial=self.root)
        return (*chain_above(self.root), *(folder_id(path) for path in paths))

    def _prune(self, folder: str) -> None:
        while folder != self.root:
            try:
                os.rmdir(folder)
            except OSError:
                return
            folder = os.path.dirname(folder)


def _file_status(path: str) -> os.stat_result:
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError
    return status


def _current_etag(path: str) -> str | None:
    try:
        return local_etag(_file_status(path))
    except ABSENT:
        return None


def _link(temporary: str, path: str) -> None:
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        raise ConditionalWriteUnsupported(
            "this file system has no hard links, so two writers cannot be told apart",
            where=path,
            next_step="put the workspace on a file system that has them, or in object storage",
        ) from None


@contextmanager
def _written_aside(path: str, data: bytes) -> Iterator[tuple[str, str]]:
    """The bytes in a private file beside `path`, which the caller links or moves to `path`, and their etag.

    The bytes reach the disk before that and the folder's entry after it: a power cut leaves all or nothing.
    """
    folder = os.path.dirname(path)
    temporary = f"{folder}/{PRIVATE_PREFIX}{uuid.uuid4().hex}"
    try:
        with open(_create(temporary), "wb") as file:
            file.write(data)
            file.flush()
            # The kernel's own stamp moves in steps of milliseconds: two quick writes would share an etag.
            now_ns = time.time_ns()
            os.utime(file.fileno(), ns=(now_ns, now_ns))
            os.fsync(file.fileno())
            etag = local_etag(os.fstat(file.fileno()))
        yield temporary, etag
        _sync_folder(folder)
    finally:
        with suppress(*ABSENT):
            os.unlink(temporary)


def _create(path: str, *, attempts_left: int = 100) -> int:
    while True:
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            return os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except (FileNotFoundError, FileExistsError):
            # A delete has just pruned the empty folder; or, for good, a file or a broken link is in the way.
            attempts_left -= 1
            if attempts_left == 0:
                raise


def _sync_folder(folder: str) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return  # a delete has just removed the object again, and the folder with it
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _folder_lock(path: str) -> Iterator[None]:
    """Held by one conditional writer in the folder at a time; the system frees it if the process dies.

    The file stays: to delete it is to risk that two writers hold two different locks.
    """
    with open(f"{os.path.dirname(path)}/{LOCK_NAME}", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _reading(where: str) -> Iterator[None]:
    try:
        yield
    except IsADirectoryError:
        raise ObjectNotFound("this is a folder, not a file", where=where) from None
    except ABSENT:
        raise ObjectNotFound("the file does not exist", where=where) from None
    except OSError as error:
        raise _translated(error, error.filename or where) from None


@contextmanager
def _writing(where: str) -> Iterator[None]:
    try:
        yield
    except (FileExistsError, NotADirectoryError, IsADirectoryError):
        raise StorageError(
            "a file and a folder cannot have the same name on a local disk",
            where=where,
            next_step="remove the one of them that is not wanted",
        ) from None
    except OSError as error:
        raise _translated(error, where) from None


def _translated(error: OSError, where: str) -> StorageError:
    if isinstance(error, PermissionError):
        return AccessDenied(
            "permission denied",
            where=where,
            next_step=f"give the user with id {os.geteuid()} access to it (ls -ld, chmod)",
        )
    if error.errno in _DISK_FULL:
        return StorageFull("the disk is full", where=where, next_step="free space and run the command again")
    kind = ObjectUnreadable if error.errno == errno.EIO else StorageError
    return kind(f"the file system failed: {error.strerror or error}", where=where, errno=error.errno)
