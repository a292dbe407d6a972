"""From a URI to a store: s3://bucket/prefix, file:///path, or a plain path."""

from __future__ import annotations

import os
import re
from typing import Any, NamedTuple
from urllib.parse import unquote

from convoy.core.errors import AccessDenied, ConfigError, ObjectNotFound, StorageError
from convoy.storage.documents import exists
from convoy.storage.local_store import LocalStore
from convoy.storage.object_store import Blob, ObjectStore
from convoy.storage.s3_store import S3Store

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_LOCAL = "/"
# Reads of one store that may fail with none between them that does not: more are no fault of single objects.
_MOST_FAILURES_IN_A_ROW = 64


def open_store(uri: str) -> ObjectStore:
    """The store whose root is `uri`; nothing is read or written yet.

    A relative path counts from the working directory, '~' is the home. An s3:// URI is taken literally, a
    file:// URI is percent-decoded. ConfigError for any other scheme, and for an empty or incomplete URI.
    """
    if uri.startswith("s3://"):
        bucket, key = _split_s3(uri)
        return S3Store(bucket, key.rstrip("/"))
    return LocalStore(_local_path(uri))


def open_object(uri: str) -> tuple[ObjectStore, str]:
    """The store of the folder that an object is in, and the object's key there.

    ConfigError as `open_store`, and for a folder, that is a URI without a name or with '/' at the end.
    """
    if uri.startswith("s3://"):
        bucket, key = _split_s3(uri)
        folder, _, name = key.rpartition("/")
        store: ObjectStore = S3Store(bucket, folder)
        name = name if folder else key
    else:
        folder, name = os.path.split(_local_path(uri))
        store = LocalStore(folder)
    if not name or uri.endswith("/"):
        raise ConfigError("the URI names a folder, not an object", where=uri, next_step="add the file's name")
    return store, name


class _Sample(NamedTuple):
    """What a store is asked for to see whether it gives anything."""

    key: str
    byte_range: tuple[int, int] | None


class UriReader:
    """Reads objects by their full URIs, over one store a bucket and one for all local files.

    Thread-safe, and it pickles, without its connections.
    """

    def __init__(self) -> None:
        self._stores: dict[str, ObjectStore] = {}
        self._impatient_stores: dict[str, ObjectStore] = {}
        self._last_reads: dict[str, _Sample] = {}
        # Counted without a lock: that threads lose a count does no harm.
        self._failures: dict[str, int] = {}
        self._misses: dict[str, int] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return UriReader, ()

    @property
    def num_retries(self) -> int:
        """How many requests had to be repeated so far."""
        return sum(store.num_retries for store in list(self._stores.values()))

    def get(
        self, uri: str, *, byte_range: tuple[int, int] | None = None, wanted_etag: str | None = None
    ) -> Blob:
        """As ObjectStore.get, for an s3:// URI, a file:// URI or a path. ConfigError as `open_store`."""
        place, key = _split(uri)
        store = self._stores.get(place)
        if store is None:
            new_store = LocalStore("/") if place == _LOCAL else S3Store(place)
            store = self._stores.setdefault(place, new_store)
        blob = store.get(key, byte_range=byte_range, wanted_etag=wanted_etag)
        self.note_read(uri, byte_range)
        return blob

    def note_read(self, uri: str, byte_range: tuple[int, int] | None) -> None:
        """Note that its store gave this, for `still_gives` and its like."""
        place, key = _split(uri)
        self._last_reads[place] = _Sample(key, byte_range)
        self._failures[place] = 0
        self._misses[place] = 0

    def still_gives(self, uri: str) -> bool:
        """Whether the store of `uri`, which that could not be read from, gives at once what it gave last.

        If so, the failure is that of one object. Where nothing was read yet, another object of its folder is asked for.
        Never so after many failures in a row.
        """
        place, _ = _split(uri)
        self._failures[place] = self._failures.get(place, 0) + 1
        return self._failures[place] <= _MOST_FAILURES_IN_A_ROW and self._gives_another(uri) is True

    def gives_nothing(self, uri: str) -> bool:
        """Whether the disk or mount of `uri`, which does not give that, does not give what it gave last either.

        Many in a row say nothing here: a disk may have lost a whole folder. Nor does a file with no other beside it.
        """
        return self._gives_another(uri) is False

    def _gives_another(self, uri: str) -> bool | None:
        """Whether what was read last, or else another object of the folder, can be read; None where there is none."""
        place, key = _split(uri)
        store = self._impatient_store(place)
        try:
            sample = self._last_reads.get(place) or _neighbour(store, key)
            if sample is None:
                return None
            store.get(sample.key, byte_range=sample.byte_range)
        except StorageError:
            return False
        return True

    def _impatient_store(self, place: str) -> ObjectStore:
        """A store without retries: one that needs them says nothing of itself, and may give any object later."""
        new_store = LocalStore("/") if place == _LOCAL else S3Store(place, deadline_s=0.0)
        return self._impatient_stores.setdefault(place, new_store)

    def refuses_all(self, uri: str) -> bool:
        """Whether the store of `uri`, which refuses that, refuses also what it gave last.

        Where it gave nothing yet: whether it refused many objects.
        """
        place, _ = _split(uri)
        last = self._last_reads.get(place)
        if last is None:
            self._failures[place] = self._failures.get(place, 0) + 1
            return self._failures[place] > _MOST_FAILURES_IN_A_ROW
        try:
            self._impatient_store(place).get(last.key, byte_range=last.byte_range)
        except AccessDenied:
            return True
        except StorageError:
            return False
        return False

    def lacks_all(self, uri: str, num_images: int = 1) -> bool:
        """Whether the store of `uri`, which has not that, has nothing of what is read: a folder is not mounted here.

        So it is where what it gave last is not there either, or where it gave nothing yet and lacks many images; and
        neither the folder of `uri` nor that above has anything at all.
        """
        place, key = _split(uri)
        self._misses[place] = self._misses.get(place, 0) + num_images
        last = self._last_reads.get(place)
        if last is None and self._misses[place] <= _MOST_FAILURES_IN_A_ROW:
            return False
        store = self._impatient_store(place)
        folder = _folder(key)
        # The top of a bucket is a folder as any other, that of a machine says nothing.
        folders = [name for name in (folder, _folder(folder[:-1])) if name or place != _LOCAL]
        try:
            gives = last is not None and exists(store, last.key)
            if gives or any(_has_objects(store, name) for name in folders):
                self._misses[place] = 0
                return False
        except StorageError:
            return False
        return True


def _neighbour(store: ObjectStore, key: str) -> _Sample | None:
    """The first byte of another object in the folder of a key."""
    keys = (info.key for info in store.list_objects(_folder(key)) if info.key != key and info.size_bytes)
    first = next(keys, None)
    return None if first is None else _Sample(first, (0, 1))


def _has_objects(store: ObjectStore, folder: str) -> bool:
    try:
        return any(True for _ in store.list_objects(folder))
    except ObjectNotFound:
        return False


def _folder(key: str) -> str:
    """What a key has before its name: empty, or ending in '/'."""
    return key[: key.rfind("/") + 1]


def _split(uri: str) -> tuple[str, str]:
    """The bucket of an object, or `_LOCAL`, and its key there."""
    return _split_s3(uri) if uri.startswith("s3://") else (_LOCAL, _local_path(uri).removeprefix("/"))


def _split_s3(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise ConfigError("the URI names no bucket", where=uri, next_step="write s3://bucket/prefix")
    return bucket, key


def _local_path(uri: str) -> str:
    """The absolute path of a file:// URI or of a plain path."""
    scheme = _SCHEME.match(uri)
    if not uri:
        raise ConfigError("the URI is empty", next_step="give a path or s3://bucket/prefix")
    if scheme is None:
        return _absolute(os.path.expanduser(uri))
    if scheme[1].lower() != "file":
        raise ConfigError(
            f"Convoy does not read {scheme[1]}://",
            where=uri,
            next_step="give a path or s3://bucket/prefix; other stores through their S3 interface and"
            " AWS_ENDPOINT_URL, or mounted as a folder",
        )
    host, slash, path = uri[scheme.end() :].partition("/")
    if host not in {"", "localhost"} or not slash:
        raise ConfigError("a file URI needs three slashes", where=uri, next_step="write file:///path")
    return _absolute(f"/{unquote(path)}")


def _absolute(path: str) -> str:
    # Of two slashes at the start POSIX, and abspath with it, keeps both.
    return "/" + os.path.abspath(path).lstrip("/")
