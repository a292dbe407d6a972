"""The bytes of one object, or of a range of one, checked against what the manifest knows of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, TypeVar

from convoy.core.errors import (
    AccessDenied,
    ChecksumMismatch,
    CredentialsRefused,
    ObjectArchived,
    ObjectNotFound,
    ObjectReplaced,
    ObjectUnreadable,
    ReadingRefused,
    SourceMissing,
    StorageError,
    StoreUnavailable,
)
from convoy.core.records import RejectCode, SampleRejected, Stage
from convoy.storage.object_store import Blob
from convoy.storage.stores import UriReader, open_object

T = TypeVar("T")
# What a store says of one object, whatever it says of others.
_OF_OBJECT = (ObjectNotFound, ObjectReplaced, ObjectArchived, ChecksumMismatch)


class Address(NamedTuple):
    """The columns of a manifest that say where a sample's bytes are, and by what they are known and checked."""

    uri: str
    etag: str
    size_bytes: int | None
    offset_bytes: int | None
    row_index: int | None
    container_field: str | None
    checksum: str | None
    content_id: bytes


def fetch(address: Address, uris: UriReader) -> bytes:
    """The bytes of an object, or of a range of one. What comes back wrong is read once more.

    Raises SampleRejected for another version, a wrong checksum, and what `read_or_reject` rejects; other errors pass.
    """
    for _attempt in range(2):
        blob = read_or_reject(partial(_get, address, uris), address.uri, uris)
        if blob.etag != address.etag:
            raise _reject(RejectCode.CHANGED, f"version {blob.etag} instead of {address.etag}")
        if _is_intact(blob, address):
            return blob.data
        reason = f"the bytes do not have the checksum {address.checksum}"
        rejected = _reject(RejectCode.CHECKSUM_MISMATCH, reason)
    raise rejected


def read_or_reject(read: Callable[[], T], uri: str, uris: UriReader, *, num_images: int = 1) -> T:
    """What `read` gives of an object with some images. SampleRejected after two failures of that object alone.

    That is one that the disk does not give, or that its store keeps failing to give while it gives another one. A store
    that gives nothing is no fault of an object: its errors pass, as do those that `rejecting` knows. Where it refuses
    every object, ReadingRefused is raised, SourceMissing where it has none, and StoreUnavailable of a disk that gives
    none.
    """
    for _attempt in range(2):
        try:
            return read()
        except ObjectNotFound as error:
            if uris.lacks_all(uri, num_images):
                raise _source_missing(error) from error
            raise
        except AccessDenied as error:
            if not isinstance(error, CredentialsRefused) and uris.refuses_all(uri):
                raise _reading_refused(error) from error
            raise
        except ObjectUnreadable as error:
            if uris.gives_nothing(uri):
                raise _disk_failing(error) from error
            rejected = _reject(RejectCode.UNREADABLE, error.what)
        except StorageError as error:
            if isinstance(error, _OF_OBJECT) or not uris.still_gives(uri):
                raise
            rejected = _reject(RejectCode.UNREADABLE, error.what)
    raise rejected


@contextmanager
def rejecting() -> Iterator[None]:
    """Make rejects of the errors that one sample can have; others concern the store, and pass."""
    try:
        yield
    except ObjectNotFound as error:
        raise _reject(RejectCode.GONE, error.what) from None
    except ObjectReplaced as error:
        raise _reject(RejectCode.CHANGED, error.what) from None
    except CredentialsRefused:
        # With these every sample would be refused, which says nothing of any of them.
        raise
    except AccessDenied as error:
        raise _reject(RejectCode.ACCESS_DENIED, error.what) from None
    except ObjectArchived as error:
        raise _reject(RejectCode.ARCHIVED, error.what) from None
    except ChecksumMismatch as error:
        raise _reject(RejectCode.CHECKSUM_MISMATCH, error.what) from None


def check_size(size_bytes: int | None, max_bytes: int) -> None:
    """Reject a sample that is empty or larger than `max_bytes`; None is a size that is not known yet."""
    if size_bytes == 0:
        raise SampleRejected(RejectCode.EMPTY, Stage.DECODE, "there are no bytes")
    if size_bytes is not None and size_bytes > max_bytes:
        reason = f"{size_bytes} bytes; the limit is {max_bytes}"
        raise SampleRejected(RejectCode.TOO_LARGE, Stage.DECODE, reason)


def _get(address: Address, uris: UriReader) -> Blob:
    if address.offset_bytes is None or address.size_bytes is None:
        return uris.get(address.uri, wanted_etag=address.etag)
    try:
        byte_range = (address.offset_bytes, address.size_bytes)
        return uris.get(address.uri, byte_range=byte_range, wanted_etag=address.etag)
    except StorageError as error:
        of_sample = (ObjectNotFound, AccessDenied, ObjectArchived, ObjectUnreadable)
        if error.retryable or isinstance(error, of_sample):
            raise
        # A range beyond the end: the shard may have been replaced by a shorter one.
        store, key = open_object(address.uri)
        etag = store.head(key).etag
        if etag == address.etag:
            raise
        return Blob(data=b"", etag=etag)


def _is_intact(blob: Blob, address: Address) -> bool:
    # A listing took the etag for an MD5, but of an encrypted object it is none, as the Blob then says.
    is_guess = address.checksum == f"md5:{address.etag}" and not blob.checksum
    # Of a whole object the store has compared the checksum that it vouches for.
    is_compared = address.offset_bytes is None and blob.checksum == address.checksum
    if address.checksum is None or is_guess or is_compared:
        return True
    algorithm, _, expected = address.checksum.partition(":")
    return hashlib.new(algorithm, blob.data, usedforsecurity=False).hexdigest() == expected


def _reject(code: RejectCode, reason: str) -> SampleRejected:
    return SampleRejected(code, Stage.FETCH, reason)


def _reading_refused(error: AccessDenied) -> ReadingRefused:
    return ReadingRefused(
        f"not one image may be read: {error.what}",
        where=error.where,
        next_step=f"{error.next_step or 'allow reading them'}; then run the same command again, finished work is kept."
        " Or leave these images out of the dataset, and begin with --new-run",
    )


def _disk_failing(error: ObjectUnreadable) -> StoreUnavailable:
    return StoreUnavailable(
        f"the disk or mount gives neither this image nor the one that it gave before: {error.what}",
        where=error.where,
        next_step="see to the disk, or what is mounted there; then run the same command again, finished work is kept",
    )


def _source_missing(error: ObjectNotFound) -> SourceMissing:
    return SourceMissing(
        f"not one image is where it was, nor any other file beside it: {error.what}",
        where=error.where,
        next_step="mount the folder on every node, or restore the images; then run the same command again, finished"
        " work is kept. If they were deleted for good, freeze the dataset again and begin with --new-run",
    )
