"""The files of an S3 Inventory report: found, checked, and read as columns of one schema.

https://docs.aws.amazon.com/AmazonS3/latest/userguide/storage-inventory-location.html
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from tempfile import TemporaryFile, gettempdir
from typing import IO
from urllib.parse import unquote_plus

import pyarrow as pa
from pyarrow import csv
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from convoy.core.errors import ChecksumMismatch, DataError, ObjectNotFound, StorageFull
from convoy.storage.documents import exists
from convoy.storage.object_store import ObjectStore
from convoy.storage.parquet_files import buffered_reader, open_parquet_file
from convoy.storage.stores import open_object, open_store

# What is read of a report, under the names of its parquet files; what a report lacks is null.
INVENTORY_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string()),
        pa.field("size", pa.int64()),
        pa.field("e_tag", pa.string()),
        pa.field("is_latest", pa.bool_()),
        pa.field("is_delete_marker", pa.bool_()),
        pa.field("storage_class", pa.string()),
        pa.field("intelligent_tiering_access_tier", pa.string()),
        pa.field("is_multipart_uploaded", pa.bool_()),
        pa.field("encryption_status", pa.string()),
    ]
)
# The same columns in the schema of a report in CSV, whose files have no header.
_CSV_NAMES = [
    "Key",
    "Size",
    "ETag",
    "IsLatest",
    "IsDeleteMarker",
    "StorageClass",
    "IntelligentTieringAccessTier",
    "IsMultipartUploaded",
    "EncryptionStatus",
]
# Without the first columns there is nothing to freeze.
_NUM_REQUIRED = 3
_CSV, _PARQUET = "CSV", "Parquet"

_MANIFEST = "manifest.json"
_REPORT_FOLDER = re.compile(r"\d{4}-\d\d-\d\dT\d\d-\d\dZ")
_COPY_BYTES = 16 << 20
_CSV_BLOCK_BYTES = 8 << 20
_ROWS_PER_BATCH = 65_536


class InventoryFile(BaseModel):
    """One data file: its key in the bucket that the report was delivered to, and the MD5 of its bytes."""

    model_config = ConfigDict(frozen=True)

    key: str
    md5: str = Field(alias="MD5checksum")


class InventoryReport(BaseModel):
    """`manifest.json`, as far as it is used. In a report in CSV, `file_schema` are the names of the columns."""

    model_config = ConfigDict(frozen=True)

    source_bucket: str = Field(alias="sourceBucket")
    created_unix_ms: int | None = Field(default=None, alias="creationTimestamp")
    file_format: str = Field(alias="fileFormat")
    file_schema: str = Field(alias="fileSchema")
    files: tuple[InventoryFile, ...]


def may_hold_report(keys: Iterable[str]) -> bool:
    """Whether keys below a folder look like those of a report, or of the folders of reports by date."""
    folders = (key.removesuffix(_MANIFEST) for key in keys if key.endswith(_MANIFEST))
    return any(not folder or _REPORT_FOLDER.fullmatch(folder.removesuffix("/")) for folder in folders)


def is_report(uri: str) -> bool:
    """Whether `open_report` finds a report there, of any format."""
    try:
        open_report(uri)
    except DataError:
        return False
    return True


def open_report(uri: str) -> tuple[InventoryReport, str]:
    """A report and the URI of its `manifest.json`: that file, its folder, or the newest of the folders by date.

    Raises DataError where there is none.
    """
    store, key = _find_manifest(uri)
    try:
        return InventoryReport.model_validate_json(store.get(key).data), store.uri(key)
    except (ObjectNotFound, ValidationError) as error:
        raise DataError(
            f"this is no report of S3 Inventory ({_first_line(error)})",
            where=store.uri(key),
            next_step="give the manifest.json of a report, or a folder with one",
        ) from None


def find_files(report: InventoryReport, manifest_uri: str) -> tuple[ObjectStore, list[str]]:
    """The store and the keys of a report's files: where they were delivered, or beside a copy of the manifest.

    A copy may have lost folders above. So the first file is looked for by its whole key and then by ever shorter
    ends of it, below every folder that leads to the manifest. Raises DataError where it is nowhere.
    """
    names = report.files[0].key.split("/")
    for start in range(len(names)):
        for folder in _folders_above(manifest_uri):
            store = open_store(folder)
            if exists(store, "/".join(names[start:])):
                return store, ["/".join(file.key.split("/")[start:]) for file in report.files]
    raise DataError(
        f"the first file of the report is missing: {report.files[0].key}",
        where=manifest_uri,
        next_step="copy the folder `data` beside the reports too, or take a newer report",
    )


def iter_file(
    report: InventoryReport, file: InventoryFile, store: ObjectStore, key: str
) -> Iterator[pa.RecordBatch]:
    """The rows of a data file that lies at `key`, in batches of INVENTORY_SCHEMA; never all of them in memory.

    Raises ChecksumMismatch where the bytes are not those of the report, and DataError for a format or columns
    that cannot be used.
    """
    where = store.uri(key)
    if report.file_format not in (_CSV, _PARQUET):
        raise DataError(
            f"Convoy does not read reports in {report.file_format}",
            where=where,
            next_step="set the format of the inventory to Parquet or CSV, and wait for the next report",
        )
    with _checked_copy(store, key, file.md5) as copy:
        try:
            if report.file_format == _CSV:
                yield from _read_csv(copy, [name.strip() for name in report.file_schema.split(",")], where)
            else:
                yield from _read_parquet(copy, where)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(f"the file cannot be read ({_first_line(error)})", where=where) from None


def _find_manifest(uri: str) -> tuple[ObjectStore, str]:
    if uri.lower().endswith(".json"):
        return open_object(uri)
    store = open_store(uri)
    if exists(store, _MANIFEST):
        return store, _MANIFEST
    # The names sort by age. Of the newest report the manifest, which is written last, may still be missing.
    for folder in sorted(filter(_REPORT_FOLDER.fullmatch, store.list_folders()), reverse=True):
        if exists(store, f"{folder}/{_MANIFEST}"):
            return store, f"{folder}/{_MANIFEST}"
    return store, _MANIFEST


def _folders_above(uri: str) -> Iterator[str]:
    """The bucket, or `/`, and all folders from there to the one that a file is in."""
    scheme, num_first = ("s3://", 1) if uri.startswith("s3://") else ("/", 0)
    names = uri.removeprefix(scheme).split("/")[:-1]
    for count in range(num_first, len(names) + 1):
        yield scheme + "/".join(names[:count])


@contextmanager
def _checked_copy(store: ObjectStore, key: str, md5: str) -> Iterator[IO[bytes]]:
    """The bytes of a file in a temporary file on disk, once they have proved to be those of the report."""
    hasher = hashlib.md5(usedforsecurity=False)
    with TemporaryFile() as copy:
        with buffered_reader(store, key) as stream:
            while chunk := stream.read(_COPY_BYTES):
                hasher.update(chunk)
                try:
                    copy.write(chunk)
                    copy.flush()
                except OSError as error:
                    raise StorageFull(
                        f"a file of the report has no room on disk: {error.strerror}",
                        where=gettempdir(),
                        next_step="make room there, or let TMPDIR name a larger disk; then run the command again",
                    ) from error
        if hasher.hexdigest() != md5.lower():
            raise ChecksumMismatch(
                f"the file has the MD5 {hasher.hexdigest()}, but {md5} in the report",
                where=store.uri(key),
                next_step="run the command again; if that does not help, take another report",
            )
        copy.seek(0)
        yield copy


def _read_csv(copy: IO[bytes], names: list[str], where: str) -> Iterator[pa.RecordBatch]:
    _require_columns(_CSV_NAMES[:_NUM_REQUIRED], names, where)
    types = dict(zip(_CSV_NAMES, INVENTORY_SCHEMA.types, strict=True))
    with pa.CompressedInputStream(copy, "gzip") as stream:
        batches = csv.open_csv(
            stream,
            csv.ReadOptions(column_names=names, block_size=_CSV_BLOCK_BYTES),
            convert_options=csv.ConvertOptions(
                column_types=types, include_columns=_CSV_NAMES, include_missing_columns=True
            ),
        )
        for batch in batches:
            # URL-encoded as by a form: a space is a plus.
            keys = [unquote_plus(key, errors="strict") for key in batch.column(0).to_pylist()]
            yield pa.RecordBatch.from_arrays([pa.array(keys), *batch.columns[1:]], schema=INVENTORY_SCHEMA)


def _read_parquet(copy: IO[bytes], where: str) -> Iterator[pa.RecordBatch]:
    file = open_parquet_file(copy, where=where)
    present = [name for name in INVENTORY_SCHEMA.names if name in file.schema_arrow.names]
    _require_columns(INVENTORY_SCHEMA.names[:_NUM_REQUIRED], present, where)
    for batch in file.iter_batches(_ROWS_PER_BATCH, columns=present):
        columns = [
            batch[field.name].cast(field.type) if field.name in present else pa.nulls(len(batch), field.type)
            for field in INVENTORY_SCHEMA
        ]
        yield pa.RecordBatch.from_arrays(columns, schema=INVENTORY_SCHEMA)


def _require_columns(required: Iterable[str], present: Iterable[str], where: str) -> None:
    missing = sorted(set(required) - set(present))
    if missing:
        raise DataError(
            f"the report has no column {', '.join(missing)}",
            where=where,
            next_step="add size and ETag to the fields of the inventory, and wait for the next report",
        )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
