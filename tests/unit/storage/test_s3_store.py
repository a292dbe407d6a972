"""S3Store against faults that a healthy server does not show, from a small server on loopback.

Every test checks how many requests arrived: a fault that was not met would prove nothing.
"""

from __future__ import annotations

import base64
import hashlib
import multiprocessing
import pickle
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from convoy.core.errors import (
    AccessDenied,
    ConditionalWriteUnsupported,
    ConfigError,
    CredentialsExpired,
    CredentialsRefused,
    ObjectArchived,
    PreconditionFailed,
    StorageError,
    StoreUnavailable,
)
from convoy.storage.s3_store import DELETE_BATCH, S3Store

SECRET = "wJalr-the-secret"


class FaultyS3(ThreadingHTTPServer):
    """A bucket in memory. Before a request is served, the next of `faults` may answer, or spoil it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, bytes] = {}
        self.faults: list[Callable[[_Handler], bool]] = []
        self.requests: list[str] = []
        self.headers: dict[str, str] = {}
        self.lock = threading.Lock()


class _Handler(BaseHTTPRequestHandler):
    server: FaultyS3
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def handle_any(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.key = unquote(urlsplit(self.path).path).removeprefix("/bucket/")
        with self.server.lock:
            self.server.requests.append(self.command)
            fault = self.server.faults.pop(0) if self.server.faults else None
            if fault is None or not fault(self):
                getattr(self, f"serve_{self.command.lower()}")()

    do_GET = do_PUT = do_POST = do_HEAD = handle_any

    def serve_get(self) -> None:
        data = self.server.objects.get(self.key)
        if data is None:
            self.refuse(404, "NoSuchKey")
        else:
            self.answer(200, data, ETag=etag_of(data), **self.server.headers)

    serve_head = serve_get

    def serve_put(self) -> None:
        present = etag_of(self.server.objects[self.key]) if self.key in self.server.objects else None
        is_refused = (self.headers["If-None-Match"] == "*" and present is not None) or (
            self.headers["If-Match"] not in {None, present}
        )
        if not self.is_intact:
            self.refuse(400, "BadDigest")
        elif is_refused:
            self.refuse(412, "PreconditionFailed")
        else:
            self.server.objects[self.key] = self.body
            self.answer(200, b"", ETag=etag_of(self.body))

    @property
    def is_intact(self) -> bool:
        return self.headers["Content-MD5"] == base64.b64encode(hashlib.md5(self.body).digest()).decode()

    def serve_post(self) -> None:
        if not self.is_intact:
            self.refuse(400, "MissingContentMD5")
            return
        for key in re.findall(rb"<Key>(.*?)</Key>", self.body):
            self.server.objects.pop(key.decode(), None)
        self.answer(200, b"<DeleteResult/>")

    def answer(self, status: int, data: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, code: str, message: str = "no") -> None:
        self.answer(status, f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode())

    def drop(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


def etag_of(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


def refusal(status: int, code: str, message: str = "no") -> Callable[[_Handler], bool]:
    def fault(request: _Handler) -> bool:
        request.refuse(status, code, message)
        return True

    return fault


def dropped(request: _Handler) -> bool:
    request.drop()
    return True


def cut_short(request: _Handler) -> bool:
    data = request.server.objects[request.key]
    request.send_response(200)
    request.send_header("ETag", etag_of(data))
    request.send_header("Content-Length", str(len(data)))
    request.end_headers()
    request.wfile.write(data[: len(data) // 2])
    request.drop()
    return True


def answer_lost(request: _Handler) -> bool:
    """The request is served, but nobody hears of it."""
    request.answer = lambda *_, **__: None  # type: ignore[method-assign]
    request.serve_put()
    request.drop()
    return True


def damaged(request: _Handler) -> bool:
    request.body = b"#" + request.body[1:]
    return False


def answered_with(body: str) -> Callable[[_Handler], bool]:
    def fault(request: _Handler) -> bool:
        request.answer(200, body.encode())
        return True

    return fault


@contextmanager
def serving() -> Iterator[FaultyS3]:
    with FaultyS3() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    with serving() as server:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server


@pytest.fixture
def store(server: FaultyS3) -> S3Store:
    return S3Store("bucket", deadline_s=10.0)


@pytest.mark.parametrize("fault", [cut_short, dropped])
def test_a_body_that_breaks_off_is_read_again(
    server: FaultyS3, store: S3Store, fault: Callable[[_Handler], bool]
) -> None:
    server.objects["image"] = bytes(range(256)) * 400
    server.faults = [fault, fault]
    assert store.get("image").data == server.objects["image"]
    assert store.get("image", byte_range=(0, 102_400)).data == server.objects["image"]
    assert server.requests == ["GET"] * 4


@pytest.mark.parametrize("new_retries", ["true", "false"])
@pytest.mark.parametrize(
    ("status", "code"),
    [(503, "SlowDown"), (500, "InternalError"), (502, ""), (504, ""), (429, "TooManyRequests")],
)
def test_a_server_in_trouble_is_asked_again(
    server: FaultyS3,
    store: S3Store,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    code: str,
    new_retries: str,
) -> None:
    monkeypatch.setenv("AWS_NEW_RETRIES_2026", new_retries)
    server.objects["image"] = b"image"
    server.faults = [refusal(status, code)] * 2
    assert store.get("image").data == b"image"
    assert server.requests == ["GET"] * 3


@pytest.mark.parametrize("code", ["ThrottlingException", "KMS.ThrottlingException", "RequestLimitExceeded"])
@pytest.mark.parametrize("read", [S3Store.get, S3Store.head])
def test_a_service_that_throttles_with_an_odd_status_is_asked_again(
    server: FaultyS3, store: S3Store, read: Callable[[S3Store, str], object], code: str
) -> None:
    server.objects["image"] = b"image"
    # More often than botocore asks by itself.
    server.faults = [refusal(400, code)] * 4
    read(store, "image")
    assert len(server.requests) > 4


def test_a_server_that_stays_in_trouble_is_given_up_at_the_deadline(server: FaultyS3) -> None:
    server.faults = [refusal(503, "SlowDown")] * 1000
    with pytest.raises(StoreUnavailable, match="slow down") as caught:
        S3Store("bucket", deadline_s=4.0).put("image", b"image")
    assert caught.value.retryable
    assert 3 <= len(server.requests) < 100


def test_a_transfer_that_breaks_off_after_the_deadline_gets_another_chance(
    server: FaultyS3,
) -> None:
    def breaking_off_late(request: _Handler) -> bool:
        time.sleep(0.8)
        return cut_short(request)

    server.objects["image"] = b"image"
    server.faults = [breaking_off_late]
    # Longer than the longest pause before a second attempt.
    assert S3Store("bucket", deadline_s=0.6).get("image").data == b"image"
    assert server.requests == ["GET"] * 2


def test_an_error_that_will_not_pass_is_not_repeated(server: FaultyS3, store: S3Store) -> None:
    server.faults = [refusal(403, "AccessDenied")]
    with pytest.raises(AccessDenied, match="s3:PutObject"):
        store.put("image", b"image")
    assert server.requests == ["PUT"]


def test_bytes_that_were_damaged_on_the_way_are_sent_again(server: FaultyS3, store: S3Store) -> None:
    server.faults = [damaged]
    store.put("image", b"image")
    assert server.objects == {"image": b"image"}
    assert server.requests == ["PUT"] * 2


def test_a_create_whose_answer_was_lost_is_recognised(server: FaultyS3, store: S3Store) -> None:
    server.faults = [answer_lost]
    etag = store.put_if_absent("manifest", b"by me")
    assert server.objects == {"manifest": b"by me"}
    assert etag == etag_of(b"by me").strip('"')
    assert server.requests == ["PUT", "PUT", "GET"]


def test_a_replace_whose_answer_was_lost_is_recognised(server: FaultyS3, store: S3Store) -> None:
    etag = store.put("alias", b"old")
    server.faults = [answer_lost]
    assert store.put_if_match("alias", b"by me", etag=etag) == etag_of(b"by me").strip('"')
    assert server.objects == {"alias": b"by me"}
    assert server.requests == ["PUT", "PUT", "PUT", "GET"]


def test_a_version_is_replaced_only_if_it_is_the_expected_one(server: FaultyS3, store: S3Store) -> None:
    first = store.put("alias", b"first")
    second = store.put_if_match("alias", b"second", etag=first)
    with pytest.raises(PreconditionFailed):
        store.put_if_match("alias", b"third", etag=first)
    store.delete(["alias"])
    with pytest.raises(PreconditionFailed):
        store.put_if_match("alias", b"third", etag=second)
    assert server.objects == {}


def test_a_missing_version_that_the_server_calls_not_found_is_a_refusal(
    server: FaultyS3, store: S3Store
) -> None:
    server.faults = [refusal(404, "NoSuchKey")]  # what AWS answers to If-Match without an object
    with pytest.raises(PreconditionFailed):
        store.put_if_match("alias", b"new", etag="0" * 32)
    assert server.requests == ["PUT", "GET"]


def test_a_conflict_between_writers_is_repeated_not_taken_for_an_object(
    server: FaultyS3, store: S3Store
) -> None:
    server.faults = [refusal(409, "ConditionalRequestConflict")]
    store.put_if_absent("manifest", b"by me")
    assert server.objects == {"manifest": b"by me"}
    assert server.requests == ["PUT"] * 2


def test_a_create_that_others_won_is_refused(server: FaultyS3, store: S3Store) -> None:
    server.objects["manifest"] = b"by others"
    with pytest.raises(PreconditionFailed) as caught:
        store.put_if_absent("manifest", b"by me")
    assert caught.value.where == "s3://bucket/manifest"
    assert server.objects == {"manifest": b"by others"}


def test_a_server_without_conditional_writes_is_named_as_such(server: FaultyS3, store: S3Store) -> None:
    server.faults = [refusal(501, "NotImplemented")] * 2
    with pytest.raises(ConditionalWriteUnsupported):
        store.put_if_absent("manifest", b"by me")
    with pytest.raises(ConditionalWriteUnsupported):
        store.put_if_match("manifest", b"by me", etag="0" * 32)
    assert server.objects == {}


@pytest.mark.parametrize(
    ("status", "code", "kind", "words"),
    [
        (403, "RequestTimeTooSkewed", StorageError, "clock.*15 minutes.*timedatectl"),
        (403, "InvalidAccessKeyId", CredentialsRefused, "AWS_ACCESS_KEY_ID"),
        (403, "SignatureDoesNotMatch", CredentialsRefused, "AWS_SECRET_ACCESS_KEY"),
        (404, "NoSuchBucket", StorageError, "bucket does not exist"),
        (400, "AuthorizationHeaderMalformed", StorageError, "AWS_DEFAULT_REGION"),
        (403, "InvalidObjectState", ObjectArchived, "Glacier"),
        (400, "KeyTooLongError", StorageError, "PutObject: KeyTooLongError no"),
    ],
)
def test_a_refusal_says_what_to_do(
    server: FaultyS3, store: S3Store, status: int, code: str, kind: type[StorageError], words: str
) -> None:
    server.faults = [refusal(status, code)]
    with pytest.raises(kind, match=f"(?s){words}") as caught:
        store.put("image", b"image")
    assert type(caught.value) is kind
    assert caught.value.fields["code"] == code
    assert SECRET not in repr(pickle.dumps(caught.value))
    assert server.requests == ["PUT"]


@pytest.mark.parametrize(
    ("code", "message", "kind"),
    [
        ("KMS.DisabledException", "no", AccessDenied),
        ("KMS.NotFoundException", "no", AccessDenied),
        ("KMS.KMSInvalidStateException", "no", AccessDenied),
        ("InvalidRequest", "The object was stored using a form of Server Side Encryption.", AccessDenied),
        ("InvalidRequest", "Please use AWS4-HMAC-SHA256.", StorageError),
    ],
)
def test_a_key_that_an_object_is_under_concerns_that_object_only(
    server: FaultyS3, store: S3Store, code: str, message: str, kind: type[StorageError]
) -> None:
    server.faults = [refusal(400, code, message)]
    with pytest.raises(StorageError) as caught:
        store.get("image")
    assert (type(caught.value), server.requests) == (kind, ["GET"])


def test_expired_credentials_are_looked_up_once_more(server: FaultyS3, store: S3Store) -> None:
    server.faults = [refusal(403, "ExpiredToken")] * 2
    with pytest.raises(CredentialsExpired, match=r"(?s)have expired.*same command"):
        store.put("image", b"image")
    assert server.requests == ["PUT"] * 2


def test_a_password_in_the_endpoint_is_not_told(server: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://user:{SECRET}@127.0.0.1:1")
    with pytest.raises(StoreUnavailable, match="AWS_ENDPOINT_URL") as caught:
        S3Store("bucket", deadline_s=0.1).get("image")
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_PROFILE", "no-such-profile"),
        ("AWS_ENDPOINT_URL", "not a url"),
        ("AWS_DEFAULT_REGION", "no region!"),
    ],
)
def test_settings_that_cannot_be_used_are_config_errors(
    store: S3Store, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError):
        store.get("image")


@pytest.mark.parametrize(
    "headers",
    [
        {"x-amz-server-side-encryption": "aws:kms"},
        {"x-amz-server-side-encryption": "aws:kms:dsse"},
        {"x-amz-server-side-encryption-customer-algorithm": "AES256"},
    ],
)
def test_the_etag_of_an_encrypted_object_is_no_checksum(
    server: FaultyS3, store: S3Store, headers: dict[str, str]
) -> None:
    server.objects["image"] = b"image"
    assert store.get("image").checksum == f"md5:{hashlib.md5(b'image').hexdigest()}"
    server.headers = {"x-amz-server-side-encryption": "AES256"}
    assert store.head("image").checksum == f"md5:{hashlib.md5(b'image').hexdigest()}"
    server.headers = headers
    assert store.get("image").checksum == ""
    assert store.head("image").checksum == ""


def test_a_listing_out_of_order_is_refused(server: FaultyS3, store: S3Store) -> None:
    entry = "<Contents><Key>{}</Key><Size>1</Size><ETag>e</ETag></Contents>"
    page = "".join(entry.format(key) for key in "acb")
    server.faults = [answered_with(f"<ListBucketResult>{page}</ListBucketResult>")]
    listing = store.list_objects()
    assert [next(listing).key, next(listing).key] == ["a", "c"]
    with pytest.raises(StorageError, match="order"):
        next(listing)


def test_the_marker_of_the_root_is_not_listed_even_if_it_has_content(server: FaultyS3) -> None:
    entry = "<Contents><Key>{}</Key><Size>1</Size><ETag>e</ETag></Contents>"
    page = "".join(entry.format(key) for key in ("data/", "data/a", "data/cat/"))
    end = "<IsTruncated>false</IsTruncated>"
    server.faults = [answered_with(f"<ListBucketResult>{page}{end}</ListBucketResult>")]
    assert [info.key for info in S3Store("bucket", "data").list_objects()] == ["a", "cat/"]


def test_a_key_that_could_not_be_deleted_is_named(server: FaultyS3, store: S3Store) -> None:
    body = "<DeleteResult><Error><Key>kept</Key><Code>AccessDenied</Code></Error></DeleteResult>"
    server.faults = [answered_with(body)]
    with pytest.raises(AccessDenied, match="s3:DeleteObject") as caught:
        store.delete(["gone", "kept"])
    assert caught.value.where == "s3://bucket/kept"


def test_a_key_that_could_not_be_deleted_just_now_is_deleted_later(server: FaultyS3, store: S3Store) -> None:
    body = "<DeleteResult><Error><Key>late</Key><Code>InternalError</Code></Error></DeleteResult>"
    server.objects = {"late": b"x"}
    server.faults = [answered_with(body)]
    store.delete(["late"])
    assert server.objects == {}
    assert server.requests == ["POST"] * 2


def test_deletes_go_in_batches(server: FaultyS3, store: S3Store) -> None:
    server.objects = {f"part-{number}": b"" for number in range(2 * DELETE_BATCH + 1)}
    store.delete(list(server.objects))
    assert server.objects == {}
    assert server.requests == ["POST"] * 3


def test_a_pickled_store_keeps_its_place_and_its_deadline(server: FaultyS3) -> None:
    server.objects["folder/image"] = b"image"
    store = S3Store("bucket", "folder", deadline_s=3.0)
    store.get("image")
    copy = pickle.loads(pickle.dumps(store))
    assert (copy.bucket, copy.prefix, copy.deadline_s) == ("bucket", "folder", 3.0)
    assert copy.get("image").data == b"image"


def test_a_forked_child_does_not_share_the_connections_of_its_parent(
    server: FaultyS3, store: S3Store
) -> None:
    server.objects["image"] = b"image"
    store.get("image")
    client = store._get_client()

    def work_in_child() -> None:
        store.get("image")
        sys.exit(store._get_client() is client)

    child = multiprocessing.get_context("fork").Process(target=work_in_child)
    child.start()
    child.join()
    assert child.exitcode == 0
    assert store._get_client() is client
    assert store.get("image").data == b"image"


def test_the_server_is_named_without_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://me:{SECRET}@minio:9000")
    assert S3Store("bucket").endpoint_url == "http://minio:9000"
