"""Small reports of S3 Inventory, in the form that S3 writes them, made for tests."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote_plus

import pyarrow as pa
import pyarrow.parquet as pq

REPORT = "inventory/photos/all"
DATED = "2026-11-20T00-00Z"
MANIFEST_KEY = f"{REPORT}/{DATED}/manifest.json"

# The name in CSV of each column, its name in parquet, and the type there.
_COLUMNS = {
    "Bucket": ("bucket", pa.string()),
    "Key": ("key", pa.string()),
    "VersionId": ("version_id", pa.string()),
    "IsLatest": ("is_latest", pa.bool_()),
    "IsDeleteMarker": ("is_delete_marker", pa.bool_()),
    "Size": ("size", pa.int64()),
    "LastModifiedDate": ("last_modified_date", pa.timestamp("ms")),
    "ETag": ("e_tag", pa.string()),
    "StorageClass": ("storage_class", pa.string()),
    "IsMultipartUploaded": ("is_multipart_uploaded", pa.bool_()),
    "EncryptionStatus": ("encryption_status", pa.string()),
    "IntelligentTieringAccessTier": ("intelligent_tiering_access_tier", pa.string()),
}
SMALL_FIELDS = ("Bucket", "Key", "Size", "LastModifiedDate", "ETag")
ALL_FIELDS = tuple(_COLUMNS)


def md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def entry(key: str, data: bytes = b"jpeg", **fields: Any) -> dict[str, Any]:
    """A row about the latest version of an object; `fields` are others by their names in CSV."""
    return {
        "Key": key,
        "IsLatest": True,
        "IsDeleteMarker": False,
        "Size": len(data),
        "ETag": md5(data),
        "StorageClass": "STANDARD",
        "IsMultipartUploaded": False,
        "EncryptionStatus": "SSE-S3",
        **fields,
    }


def made_report(
    bucket: str,
    files: Sequence[Sequence[dict[str, Any]]],
    *,
    file_format: str = "CSV",
    fields: Sequence[str] = ALL_FIELDS,
) -> dict[str, bytes]:
    """The objects of a report by their keys in the destination bucket: one data file for each of `files`."""
    suffix = {"CSV": "csv.gz", "Parquet": "parquet", "ORC": "orc"}[file_format]
    write = _parquet_bytes if file_format == "Parquet" else _csv_bytes
    rows = [[{"Bucket": bucket, **row} for row in part] for part in files]
    data = {f"{REPORT}/data/{number:04d}.{suffix}": write(part, fields) for number, part in enumerate(rows)}
    manifest = {
        "sourceBucket": bucket,
        "destinationBucket": "arn:aws:s3:::reports",
        "version": "2016-11-30",
        "creationTimestamp": "1795132800000",
        "fileFormat": file_format,
        "fileSchema": "message s3.inventory { }" if file_format == "Parquet" else ", ".join(fields),
        "files": [
            {"key": key, "size": len(content), "MD5checksum": md5(content)} for key, content in data.items()
        ],
    }
    return {**data, MANIFEST_KEY: json.dumps(manifest).encode()}


def write_report(root: Any, objects: Mapping[str, bytes]) -> None:
    """The objects as files below a folder (a Path)."""
    for key, content in objects.items():
        path = root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _csv_bytes(rows: Sequence[dict[str, Any]], fields: Sequence[str]) -> bytes:
    lines = (",".join(f'"{_csv_text(field, row.get(field))}"' for field in fields) for row in rows)
    return gzip.compress("".join(f"{line}\n" for line in lines).encode("ascii"))


def _csv_text(field: str, value: Any) -> str:
    if field == "Key":
        return quote_plus(value, safe="/")
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else str(value)


def _parquet_bytes(rows: Sequence[dict[str, Any]], fields: Sequence[str]) -> bytes:
    schema = pa.schema([_COLUMNS[field] for field in fields])
    named = [{_COLUMNS[field][0]: row.get(field) for field in fields} for row in rows]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(named, schema), buffer)
    return buffer.getvalue()
