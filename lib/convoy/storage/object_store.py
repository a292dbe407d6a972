"""The seam between Convoy and where bytes live: a small protocol, kept by a local folder and by S3."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from convoy.core.errors import ConditionalWriteUnsupported, ObjectNotFound, PreconditionFailed


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectInfo:
    """What a listing says of an object. `key` is relative to the store's root; `etag` changes with content.

    `checksum` is "md5:<hex>" where the store's etag is the MD5 of the content, else "". A listing of S3
    cannot see encryption, and with SSE-KMS or SSE-C an etag looks like an MD5 but is not one. `head` and
    `get` do see it: a listed checksum counts only if the `checksum` of the Blob that was read is not "".
    """

    key: str
    size_bytes: int
    etag: str
    checksum: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Blob:
    """The bytes of an object, or of a range of it, and the etag of the version they were read from.

    `checksum` is "md5:<hex>" of the whole object where the store vouches for it, else "".
    """

    data: bytes
    etag: str
    checksum: str = ""


class ConditionalPut(StrEnum):
    """What a store's conditional writes are worth when several writers race."""

    ATOMIC = "atomic"
    RACY = "racy"
    UNSUPPORTED = "unsupported"


class WriterMode(StrEnum):
    """How many jobs may write to one workspace at the same time."""

    MANY = "many"
    SINGLE = "single"


# The next step where a store cannot exclude two writers.
ONE_WRITER_ADVICE = (
    "make sure that only one job writes to this workspace, and add --set writers=single"
    " (`convoy models`: --writers single)"
)


class ObjectStore(Protocol):
    """A root URI and the operations below it. Keys use '/', are exact in UTF-8, and never start with '/'.

    Requests to a server are repeated inside a deadline while their faults are transient, and then raise
    StoreUnavailable; a local disk is asked once. A missing object is ObjectNotFound, a refused one AccessDenied.
    Stores are cheap to make, thread-safe, and pickle.
    """

    @property
    def root_uri(self) -> str:
        """The root, without a trailing slash: an absolute local path or s3://bucket/prefix."""
        ...

    @property
    def endpoint_url(self) -> str:
        """The server that answers, without credentials; empty for a local folder."""
        ...

    @property
    def num_retries(self) -> int:
        """How many requests had to be repeated so far, all threads of this process together."""
        ...

    def uri(self, key: str) -> str:
        """The full URI of a key; `stores.open_object` turns it back."""
        ...

    def list_objects(self, prefix: str = "", *, start_after: str = "") -> Iterator[ObjectInfo]:
        """Objects whose key starts with `prefix`, in ascending order of the key's UTF-8 bytes.

        Directory markers (empty objects whose key ends in '/') are left out.
        """
        ...

    def list_folders(self, prefix: str = "") -> list[str]:
        """The sorted names directly below `prefix` ("" or ending in '/') that have objects below them."""
        ...

    def head(self, key: str) -> ObjectInfo:
        """What is known of one object without reading it."""
        ...

    def get(
        self, key: str, *, byte_range: tuple[int, int] | None = None, wanted_etag: str | None = None
    ) -> Blob:
        """The bytes of an object, or of `byte_range` = (first byte, number of bytes).

        Never fewer bytes than that: a short body is retried, a range beyond the end is a StorageError. A whole
        object has the bytes of its `checksum`; after two that have not, ChecksumMismatch is raised. Where another
        version than the wanted one is there, nothing is read of it, however long it is: the Blob has its etag alone.
        """
        ...

    def put(self, key: str, data: bytes) -> str:
        """Write an object whole, replacing any other, and return its etag.

        Readers see all of it or none, and it survives a power cut once this has returned.
        """
        ...

    def put_if_absent(self, key: str, data: bytes) -> str:
        """Write an object that must not exist yet, and return its etag; PreconditionFailed if it exists.

        A refusal may be our own doing, if the answer to an earlier attempt was lost. So it is settled by
        reading back: an object with exactly these bytes is a success, and `data` must name its writer.
        """
        ...

    def put_if_match(self, key: str, data: bytes, *, etag: str) -> str:
        """Replace the version `etag` of an object, and return the new etag.

        PreconditionFailed if another version or none is there, settled as in `put_if_absent`;
        ConditionalWriteUnsupported if the store cannot do it.
        """
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; those that do not exist are no error."""
        ...

    def clock_skew_s(self) -> float:
        """Seconds that this machine's clock is ahead of the store's; signed requests fail from 900 on."""
        ...

    def open_parquet(self, key: str) -> Any:
        """A pyarrow.parquet.ParquetFile over the object that reads only the ranges it needs.

        DataError if the object is not a parquet file.
        """
        ...


def put_in_place_of(store: ObjectStore, key: str, data: bytes, etag: str | None) -> str:
    """Replace the version `etag` of an object, or create it where that is None; errors as `put_if_match`."""
    if etag is None:
        return store.put_if_absent(key, data)
    return store.put_if_match(key, data, etag=etag)


def put_looking_first(store: ObjectStore, key: str, data: bytes, *, replaced_etag: str | None = None) -> str:
    """As `put_in_place_of`, also where the store cannot do it: there a workspace has a single writer, and may look."""
    try:
        return put_in_place_of(store, key, data, replaced_etag)
    except ConditionalWriteUnsupported:
        if _etag(store, key) != replaced_etag:
            raise PreconditionFailed(
                "the object is not in the state that this write requires", where=store.uri(key)
            ) from None
        return store.put(key, data)


def _etag(store: ObjectStore, key: str) -> str | None:
    try:
        return store.head(key).etag
    except ObjectNotFound:
        return None


def settle_refusal(store: ObjectStore, key: str, data: bytes) -> str:
    """The etag of the object if it holds exactly `data`; otherwise raise the PreconditionFailed of `key`."""
    try:
        blob = store.get(key)
    except ObjectNotFound:
        blob = None
    if blob is not None and blob.data == data:
        return blob.etag
    raise PreconditionFailed(
        "the object is not in the state that this write requires: another writer was first",
        where=store.uri(key),
        next_step="read the object again and decide anew",
    )
