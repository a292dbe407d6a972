"""How bytes are sent to S3: with their MD5, and large objects in parts, because a single PUT takes 5 GiB at most."""

from __future__ import annotations

import base64
import hashlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Protocol

from convoy.core.errors import ConvoyError, ObjectNotFound, StorageError, StoreUnavailable

# Up to here an object is one PUT, and its etag the MD5 of its content on most servers.
WHOLE_BYTES = 256 * 2**20
# S3 takes 10,000 parts: 640 GB.
_PART_BYTES = 64 * 2**20
_PARTS_AT_ONCE = 4


class Request(Protocol):
    """Sends a request about an object, again where that may help, and returns the answer."""

    def __call__(self, operation: str, where: str, **parameters: Any) -> dict[str, Any]:
        """The operation by boto3's name, and the URI for errors."""
        ...


def content_md5(data: bytes) -> str:
    """The value of the header Content-MD5: a server that knows it refuses bytes that were damaged on the way."""
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def put_in_parts(request: Request, where: str, key: str, data: bytes) -> dict[str, Any]:
    """Write an object in parts, and return the answer to the last request, with which it appears, whole.

    Parts of an upload that the store stops answering stay there, as those of a killed process do: a lifecycle rule
    of the bucket removes them.
    """
    for _attempt in range(2):
        upload = {"Key": key, "UploadId": request("create_multipart_upload", where, Key=key)["UploadId"]}
        try:
            parts = _send_parts(request, where, upload, data)
            return request("complete_multipart_upload", where, MultipartUpload={"Parts": parts}, **upload)
        except ObjectNotFound:
            # The answer to its completion was lost, and when asked again the store knew no such upload any more.
            continue
        except StoreUnavailable:
            raise
        except ConvoyError:
            with suppress(ConvoyError):
                request("abort_multipart_upload", where, **upload)
            raise
    raise StorageError(
        "the store forgot an upload before it ended, twice in a row",
        where=where,
        next_step="run the same command again; see whether a lifecycle rule of the bucket ends uploads at once",
    )


def _send_parts(request: Request, where: str, upload: dict[str, str], data: bytes) -> list[dict[str, Any]]:
    def send(number: int) -> dict[str, Any]:
        part = data[(number - 1) * _PART_BYTES : number * _PART_BYTES]
        body = {"Body": part, "ContentMD5": content_md5(part)}
        return {
            "PartNumber": number,
            "ETag": request("upload_part", where, PartNumber=number, **body, **upload)["ETag"],
        }

    num_parts = -(-len(data) // _PART_BYTES)
    with ThreadPoolExecutor(_PARTS_AT_ONCE, thread_name_prefix="upload") as pool:
        # After an error those that wait are not sent.
        return list(pool.map(send, range(1, num_parts + 1)))
