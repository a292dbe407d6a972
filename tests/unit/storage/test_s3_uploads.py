"""Objects in parts, against a store that keeps the rules of S3's multipart uploads and can be told to fail."""

from __future__ import annotations

import base64
import hashlib
import random
from collections.abc import Callable
from typing import Any

import pytest

from convoy.core.errors import ObjectNotFound, StorageError, StorageFull, StoreUnavailable
from convoy.storage import s3_store, s3_uploads
from convoy.storage.s3_store import S3Store

PART_BYTES = 1000
DATA = random.Random(1).randbytes(4321)
KEY = "checkpoints/0000000200.ckpt"


class Uploads:
    """The store. `fail` hears of each request before it is served, and may raise."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.open: dict[str, dict[int, bytes]] = {}
        self.asked: list[str] = []
        self.fail: Callable[[str, dict[str, Any]], None] = lambda operation, parameters: None

    def request(self, operation: str, where: str, **parameters: Any) -> dict[str, Any]:
        assert where == f"s3://bucket/{KEY}"
        self.asked.append(operation)
        self.fail(operation, parameters)
        answer: dict[str, Any] = getattr(self, operation)(**parameters)
        return answer

    def create_multipart_upload(self, **parameters: Any) -> dict[str, Any]:
        upload = f"upload {len(self.asked)}"
        self.open[upload] = {}
        return {"UploadId": upload, **parameters}

    def upload_part(self, **parameters: Any) -> dict[str, Any]:
        number, body = parameters["PartNumber"], parameters["Body"]
        assert base64.b64decode(parameters["ContentMD5"]) == hashlib.md5(body).digest()
        self.open[parameters["UploadId"]][number] = body
        return {"ETag": f'"etag {number}"'}

    def complete_multipart_upload(self, **parameters: Any) -> dict[str, Any]:
        parts = self.open.pop(parameters["UploadId"], None)
        if parts is None:
            raise ObjectNotFound("the object does not exist")
        assert parameters["MultipartUpload"]["Parts"] == [
            {"PartNumber": number, "ETag": f'"etag {number}"'} for number in sorted(parts)
        ]
        self.objects[parameters["Key"]] = b"".join(parts[number] for number in sorted(parts))
        return {"ETag": '"of all-5"'}

    def abort_multipart_upload(self, **parameters: Any) -> dict[str, Any]:
        del self.open[parameters["UploadId"]]
        return {}


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> Uploads:
    uploads = Uploads()
    monkeypatch.setattr(s3_uploads, "_PART_BYTES", PART_BYTES)
    monkeypatch.setattr(s3_store, "WHOLE_BYTES", PART_BYTES)
    monkeypatch.setattr(S3Store, "_request", lambda _, *names, **fields: uploads.request(*names, **fields))
    return uploads


def test_what_is_too_large_for_one_request_goes_in_parts(uploads: Uploads) -> None:
    assert S3Store("bucket").put(KEY, DATA) == "of all-5"
    assert uploads.objects == {KEY: DATA}
    assert uploads.open == {}
    assert sorted(uploads.asked) == sorted(
        ["create_multipart_upload", *["upload_part"] * 5, "complete_multipart_upload"]
    )


def test_an_upload_whose_last_answer_was_lost_is_done_again(uploads: Uploads) -> None:
    def lost(operation: str, parameters: dict[str, Any]) -> None:
        if operation == "complete_multipart_upload" and not uploads.objects:
            uploads.complete_multipart_upload(**parameters)

    uploads.fail = lost
    assert S3Store("bucket").put(KEY, DATA) == "of all-5"
    assert uploads.objects == {KEY: DATA}
    assert uploads.asked.count("create_multipart_upload") == 2


def test_a_store_that_forgets_every_upload_is_an_error(uploads: Uploads) -> None:
    def forget(operation: str, parameters: dict[str, Any]) -> None:
        if operation == "complete_multipart_upload":
            uploads.open.clear()

    uploads.fail = forget
    with pytest.raises(StorageError, match="forgot an upload") as caught:
        S3Store("bucket").put(KEY, DATA)
    assert caught.value.where == f"s3://bucket/{KEY}"


@pytest.mark.parametrize(
    ("error", "num_left"), [(StorageFull("the store is full"), 0), (StoreUnavailable("no answer"), 1)]
)
def test_parts_of_an_upload_that_failed_are_removed_if_the_store_answers(
    uploads: Uploads, error: StorageError, num_left: int
) -> None:
    def refuse(operation: str, parameters: dict[str, Any]) -> None:
        if parameters.get("PartNumber") == 3:
            raise error

    uploads.fail = refuse
    with pytest.raises(type(error)):
        S3Store("bucket").put(KEY, DATA)
    assert len(uploads.open) == num_left
    assert uploads.objects == {}
