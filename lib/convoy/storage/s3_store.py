"""An object store in a bucket of S3 or of a server that speaks S3."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from email.utils import parsedate_to_datetime
from itertools import islice
from typing import Any, TypeVar
from urllib.parse import urlsplit

import boto3
import tenacity
from botocore.config import Config

from convoy.core.errors import (
    ChecksumMismatch,
    ConfigError,
    CredentialsExpired,
    ObjectNotFound,
    PreconditionFailed,
    StorageError,
    StoreUnavailable,
)
from convoy.storage.object_store import Blob, ObjectInfo, settle_refusal
from convoy.storage.parquet_files import buffered_reader, open_parquet_file
from convoy.storage.request_counts import REQUESTS
from convoy.storage.s3_errors import error_of_answer, s3_errors
from convoy.storage.s3_uploads import WHOLE_BYTES, content_md5, put_in_parts

# S3 takes a thousand; a server on slow disks would be silent over so many for longer than it may be.
DELETE_BATCH = 250

_MD5 = re.compile(r"[0-9a-f]{32}")
# Encryption under which the etag of a whole upload still is the MD5 of its content; None is no encryption.
_MD5_ENCRYPTIONS = (None, "AES256")
# What a server answers to a request that it refuses, as opposed to an object that is not there.
_REFUSALS = (400, 401, 403)

_log = logging.getLogger(__name__)
T = TypeVar("T")


class S3Store:
    """An ObjectStore (see there) at s3://bucket/prefix.

    Endpoint, region and credentials are found by boto3 in the environment, the profile or the role of the
    machine, and nowhere else; where they have expired, they are looked up once more. botocore rides over blips
    within a request; `read_timeout_s` is how long an answer may be silent, `deadline_s` how long a fault may
    last, from the first failure on, before an operation raises StoreUnavailable: a transfer may take as long as it
    needs. Every process makes its own client at first use.
    """

    def __init__(
        self, bucket: str, prefix: str = "", *, deadline_s: float = 120.0, read_timeout_s: float = 30.0
    ) -> None:
        self.bucket = bucket
        self.prefix = prefix
        self.deadline_s = deadline_s
        self.read_timeout_s = read_timeout_s
        self._folder = f"{prefix}/" if prefix else ""
        self._client_lock = threading.Lock()
        self._client: Any = None
        self._client_pid = 0
        self._retries_lock = threading.Lock()
        self._num_retries = 0
        # Of the operation that a thread is in.
        self._sent = threading.local()

    def __reduce__(self) -> tuple[Any, ...]:
        times = {"deadline_s": self.deadline_s, "read_timeout_s": self.read_timeout_s}
        return functools.partial(S3Store, self.bucket, self.prefix, **times), ()

    def __repr__(self) -> str:
        return f"S3Store({self.root_uri!r})"

    @property
    def root_uri(self) -> str:
        """The root as s3://bucket/prefix."""
        return f"s3://{self.bucket}/{self.prefix}" if self.prefix else f"s3://{self.bucket}"

    @property
    def endpoint_url(self) -> str:
        """As in ObjectStore."""
        parts = urlsplit(str(self._get_client().meta.endpoint_url))
        return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()

    @property
    def num_retries(self) -> int:
        """As in ObjectStore: those of botocore, and ours."""
        return self._num_retries

    def uri(self, key: str) -> str:
        """The s3:// URI of a key; nothing is escaped."""
        return f"s3://{self.bucket}/{self._folder}{key}"

    def list_objects(self, prefix: str = "", *, start_after: str = "") -> Iterator[ObjectInfo]:
        """As in ObjectStore, without markers of folders, and without the root's own even if it has content.

        StorageError if the server does not list in order, as S3 Express does not.
        """
        after = {"StartAfter": self._folder + start_after} if start_after else {}
        previous = ""
        for page in self._pages(prefix, **after):
            for entry in page.get("Contents", ()):
                key = entry["Key"].removeprefix(self._folder)
                if not key or (key.endswith("/") and entry["Size"] == 0):
                    continue
                if key <= previous:
                    raise StorageError(
                        "the store does not list in the order of the keys", where=self.root_uri
                    )
                previous = key
                etag = _etag(entry)
                yield ObjectInfo(key=key, size_bytes=entry["Size"], etag=etag, checksum=_checksum(etag, None))

    def list_folders(self, prefix: str = "") -> list[str]:
        """As in ObjectStore, but a directory marker alone makes a folder too."""
        start = len(self._folder) + len(prefix)
        return sorted(
            folder["Prefix"][start:-1]
            for page in self._pages(prefix, Delimiter="/")
            for folder in page.get("CommonPrefixes", ())
        )

    def head(self, key: str) -> ObjectInfo:
        """As in ObjectStore."""
        name = {"Key": self._folder + key}
        try:
            answer = self._request("head_object", self.uri(key), **name)
        except StorageError as error:
            if error.fields.get("status") not in _REFUSALS:
                raise
            # The answer to a HEAD has no body that could say why: that to a GET has, and is raised here.
            self._request("get_object", self.uri(key), Range="bytes=0-0", **name)["Body"].close()
            answer = self._request("head_object", self.uri(key), **name)
        etag = _etag(answer)
        return ObjectInfo(
            key=key,
            size_bytes=answer["ContentLength"],
            etag=etag,
            checksum=_checksum(etag, _encryption(answer)),
        )

    def get(
        self, key: str, *, byte_range: tuple[int, int] | None = None, wanted_etag: str | None = None
    ) -> Blob:
        """As in ObjectStore."""
        if byte_range is None:
            return self._read_whole(key, wanted_etag)
        first, num_bytes = byte_range
        if num_bytes == 0:  # HTTP has no empty range
            info = self.head(key)
            return Blob(data=b"", etag=info.etag, checksum=info.checksum)
        header = f"bytes={first}-{first + num_bytes - 1}"
        blob = self._retry(lambda: self._read(key, wanted_etag, Range=header), self.uri(key))
        if len(blob.data) != num_bytes and wanted_etag in (None, blob.etag):
            raise StorageError(
                f"bytes {first} to {first + num_bytes} are not what the store sent for them",
                where=self.uri(key),
            )
        return blob

    def put(self, key: str, data: bytes) -> str:
        """As in ObjectStore; above 256 MiB in parts, whose etag is no checksum."""
        if len(data) <= WHOLE_BYTES:
            return self._put(key, data)
        return _etag(put_in_parts(self._request, self.uri(key), self._folder + key, data))

    def put_if_absent(self, key: str, data: bytes) -> str:
        """As in ObjectStore."""
        return self._put_if(key, data, IfNoneMatch="*")

    def put_if_match(self, key: str, data: bytes, *, etag: str) -> str:
        """As in ObjectStore."""
        return self._put_if(key, data, IfMatch=f'"{etag}"')

    def delete(self, keys: Iterable[str]) -> None:
        """As in ObjectStore, some hundred keys a request."""
        remaining = iter(keys)
        while batch := list(islice(remaining, DELETE_BATCH)):
            self._retry(functools.partial(self._delete_batch, batch), self.root_uri)

    def clock_skew_s(self) -> float:
        """As in ObjectStore, from the Date header of an answer."""
        answer = self._request("list_objects_v2", self.root_uri, Prefix=self._folder, MaxKeys=1)
        date = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
        return time.time() - date.timestamp()

    def open_parquet(self, key: str) -> Any:
        """As in ObjectStore."""
        return open_parquet_file(buffered_reader(self, key), where=self.uri(key))

    def _pages(self, prefix: str, **parameters: str) -> Iterator[dict[str, Any]]:
        parameters["Prefix"] = self._folder + prefix
        while True:
            page = self._request("list_objects_v2", self.uri(prefix), **parameters)
            yield page
            if not page["IsTruncated"]:
                return
            parameters["ContinuationToken"] = page["NextContinuationToken"]

    def _read_whole(self, key: str, wanted_etag: str | None) -> Blob:
        for _attempt in range(2):
            blob = self._retry(lambda: self._read(key, wanted_etag), self.uri(key))
            if wanted_etag not in (None, blob.etag):
                return blob
            if blob.checksum in {"", f"md5:{hashlib.md5(blob.data, usedforsecurity=False).hexdigest()}"}:
                return blob
            self._add_retries(1)
        raise ChecksumMismatch(
            "the store sent other bytes than those of its checksum, twice in a row",
            where=self.uri(key),
            next_step="write the object again: what the store keeps of it is damaged",
        )

    def _read(self, key: str, wanted_etag: str | None, **byte_range: str) -> Blob:
        answer = self._get_client().get_object(Bucket=self.bucket, Key=self._folder + key, **byte_range)
        if wanted_etag not in (None, _etag(answer)):
            answer["Body"].close()
            return Blob(data=b"", etag=_etag(answer))
        data = answer["Body"].read()
        if len(data) != answer["ContentLength"]:
            raise StoreUnavailable("the store sent fewer bytes than it announced", where=self.uri(key))
        etag = _etag(answer)
        return Blob(data=data, etag=etag, checksum=_checksum(etag, _encryption(answer)))

    def _put(self, key: str, data: bytes, **condition: str) -> str:
        # The server compares the MD5: bytes that were damaged on the way are refused, and sent again.
        key_and_body = {"Key": self._folder + key, "Body": data, "ContentMD5": content_md5(data)}
        return _etag(self._request("put_object", self.uri(key), **key_and_body, **condition))

    def _put_if(self, key: str, data: bytes, **condition: str) -> str:
        try:
            return self._put(key, data, **condition)
        except (PreconditionFailed, ObjectNotFound):
            return settle_refusal(self, key, data)

    def _delete_batch(self, keys: list[str]) -> None:
        objects = [{"Key": self._folder + key} for key in keys]
        answer = self._get_client().delete_objects(
            Bucket=self.bucket, Delete={"Objects": objects, "Quiet": True}
        )
        for refusal in answer.get("Errors", ()):
            where = f"s3://{self.bucket}/{refusal.get('Key', '')}"
            raise error_of_answer(refusal, status=0, operation="DeleteObjects", where=where)

    def _request(self, operation: str, where: str, **parameters: Any) -> dict[str, Any]:
        return self._retry(
            lambda: getattr(self._get_client(), operation)(Bucket=self.bucket, **parameters), where
        )

    def _retry(self, attempt: Callable[[], T], where: str) -> T:
        """The result of `attempt`, repeated while it raises StoreUnavailable and the deadline allows it."""

        def translated_attempt() -> T:
            with s3_errors(where):
                return attempt()

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(StoreUnavailable),
            # Full jitter, so that many workers do not come back all at once.
            wait=tenacity.wait_random_exponential(multiplier=0.5, max=20),
            stop=_StopAfterFailingFor(self.deadline_s),
            before_sleep=_log_retry,
            reraise=True,
        )
        client = self._client
        self._sent.requests = 0
        try:
            return retrying(translated_attempt)
        except CredentialsExpired:
            # botocore renews those of a role by itself; a file of credentials it reads once a client.
            self._forget(client)
            return retrying(translated_attempt)
        finally:
            self._add_retries(max(self._sent.requests - 1, 0))

    def _add_retries(self, number: int) -> None:
        with self._retries_lock:
            self._num_retries += number

    def _count_request(self, request: Any, **_event: Any) -> None:
        """Hears of every request right before it is sent, in the thread of its operation."""
        self._sent.requests += 1
        REQUESTS.count(request.method)

    def _get_client(self) -> Any:
        """The client of this process: its connections must not be shared with a forked child."""
        with self._client_lock:
            if self._client is None or self._client_pid != os.getpid():
                self._client = _new_client(self.read_timeout_s)
                self._client.meta.events.register("before-send.s3", self._count_request)
                self._client.meta.events.register("before-call.s3.DeleteObjects", _add_content_md5)
                self._client_pid = os.getpid()
            return self._client

    def _forget(self, client: Any) -> None:
        """Make a new client at the next use, unless another thread has done so since `client` was the current one."""
        with self._client_lock:
            if client is None or self._client is client:
                self._client = None


class _StopAfterFailingFor(tenacity.stop.stop_base):
    """Stops an operation before the attempt that would begin so many seconds after the end of its first one."""

    def __init__(self, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self._first_failure_s = 0.0

    def __call__(self, retry_state: tenacity.RetryCallState) -> bool:
        failed_s = retry_state.outcome_timestamp
        assert failed_s is not None
        if retry_state.attempt_number == 1:
            self._first_failure_s = failed_s
        return failed_s - self._first_failure_s + retry_state.upcoming_sleep >= self._deadline_s


def _add_content_md5(params: dict[str, Any], **_call: Any) -> None:
    """To a request of which S3 wants a checksum: botocore sends a newer one, which older servers do not know."""
    params["headers"]["Content-MD5"] = content_md5(params["body"])


def _log_retry(state: tenacity.RetryCallState) -> None:
    error = state.outcome and state.outcome.exception()
    if isinstance(error, StoreUnavailable):
        _log.warning("%s [%s]; trying again in %.1f s", error.what, error.where, state.upcoming_sleep)


def _new_client(read_timeout_s: float) -> Any:
    # All of it explicit, because the defaults of botocore differ between its releases.
    config = Config(
        # Adaptive: once the store says that it is asked too often, requests go out at the rate that it serves.
        retries={"mode": "adaptive", "total_max_attempts": 3},
        connect_timeout=10,
        read_timeout=read_timeout_s,
        max_pool_connections=64,
        tcp_keepalive=True,
        # Many servers that speak S3 know nothing of the newer checksums that boto3 sends by default.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    # A session of our own: the shared default session of boto3 is not safe between threads.
    session = boto3.session.Session()
    try:
        return session.client("s3", config=config)
    except ValueError:
        raise ConfigError(
            "the endpoint or the region of the object store is not valid",
            where="AWS_ENDPOINT_URL, AWS_DEFAULT_REGION",
            next_step="correct the environment or the AWS profile",
        ) from None


def _etag(answer: dict[str, Any]) -> str:
    return str(answer["ETag"]).strip('"')


def _encryption(answer: dict[str, Any]) -> str | None:
    customer_key: str | None = answer.get("SSECustomerAlgorithm")
    return f"customer:{customer_key}" if customer_key else answer.get("ServerSideEncryption")


def _checksum(etag: str, encryption: str | None) -> str:
    is_md5 = _MD5.fullmatch(etag) is not None and encryption in _MD5_ENCRYPTIONS
    return f"md5:{etag}" if is_md5 else ""
