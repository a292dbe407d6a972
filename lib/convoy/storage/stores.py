"""From a URI to a store: s3://bucket/prefix, file:///path, or a plain path."""

from __future__ import annotations

import os
import re
from typing import Any
from urllib.parse import unquote

from convoy.core.errors import ConfigError
from convoy.storage.local_store import LocalStore
from convoy.storage.object_store import Blob, ObjectStore
from convoy.storage.s3_store import S3Store

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


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


def join_uri(root: str, *keys: str) -> str:
    """The URI of a key below a root; the root may or may not end in '/'."""
    return "/".join([root.rstrip("/"), *keys])


class UriReader:
    """Reads objects by their full URIs, over one store a bucket and one for all local files.

    Thread-safe, and it pickles, without its connections.
    """

    def __init__(self) -> None:
        self._stores: dict[str, ObjectStore] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return UriReader, ()

    @property
    def num_retries(self) -> int:
        """How many requests had to be repeated so far."""
        return sum(store.num_retries for store in list(self._stores.values()))

    def get(self, uri: str, *, byte_range: tuple[int, int] | None = None) -> Blob:
        """As ObjectStore.get, for an s3:// URI, a file:// URI or a path. ConfigError as `open_store`."""
        if uri.startswith("s3://"):
            bucket, key = _split_s3(uri)
            store = self._stores.get(bucket) or self._stores.setdefault(bucket, S3Store(bucket))
        else:
            key = _local_path(uri).removeprefix("/")
            store = self._stores.get("/") or self._stores.setdefault("/", LocalStore("/"))
        return store.get(key, byte_range=byte_range)


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
