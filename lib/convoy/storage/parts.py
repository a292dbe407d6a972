"""Part files: the public parquet contract of features and rejects, built in memory and written in one put."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from convoy.core.crash_points import CrashPoint, crash_point
from convoy.core.fingerprints import MultisetDigest, digest_bytes
from convoy.core.records import Reject
from convoy.storage.commits import PartFile, RunManifest
from convoy.storage.object_store import ObjectStore

FEATURES_SCHEMA_VERSION = 1
REJECTS_SCHEMA_VERSION = 1

REJECTS_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("etag", pa.string(), nullable=False),
        pa.field("content_id", pa.binary(16), nullable=False),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("code", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("attempt", pa.string(), nullable=False),
    ]
)


def features_schema(num_features: int, dtype: str) -> pa.Schema:
    """Columns of a feature part. `features` has a fixed length; `dtype` is float16 or float32."""
    value_type = {"float16": pa.float16(), "float32": pa.float32()}[dtype]
    return pa.schema(
        [
            pa.field("sample_id", pa.string(), nullable=False),
            # Of the manifest: the key by which rows are found again.
            pa.field("content_id", pa.binary(16), nullable=False),
            # Of the bytes that were read: finds exact duplicates and label conflicts.
            pa.field("content_digest", pa.binary(16), nullable=False),
            pa.field("view", pa.int32(), nullable=False),
            pa.field(
                "features",
                pa.list_(pa.field("item", value_type, nullable=False), num_features),
                nullable=False,
            ),
        ]
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureRows:
    """The rows of one slice that go into one set. `features_BD` is float16 or float32 and C-contiguous."""

    sample_ids: Sequence[str]
    content_ids: Sequence[bytes]
    content_digests: Sequence[bytes]
    view: int
    features_BD: np.ndarray


def write_features(store: ObjectStore, key: str, rows: FeatureRows, metadata: Mapping[str, str]) -> PartFile:
    """Write one feature part and return what proves it."""
    num_rows, num_features = rows.features_BD.shape
    schema = features_schema(num_features, rows.features_BD.dtype.name)
    values = pa.array(rows.features_BD.reshape(-1), schema.field("features").type.value_type)
    table = pa.table(
        {
            "sample_id": pa.array(rows.sample_ids, pa.string()),
            "content_id": pa.array(rows.content_ids, pa.binary(16)),
            "content_digest": pa.array(rows.content_digests, pa.binary(16)),
            "view": pa.array(np.full(num_rows, rows.view, dtype=np.int32)),
            "features": pa.FixedSizeListArray.from_arrays(values, type=schema.field("features").type),
        },
        schema=schema,
    )
    part = write_table(store, key, table, metadata, _digest_features(rows))
    crash_point(CrashPoint.PART_WRITTEN)
    return part


def write_table(
    store: ObjectStore, key: str, table: pa.Table, metadata: Mapping[str, str], rows_digest: str
) -> PartFile:
    """Write a table with file metadata in one put, and return what proves it."""
    # Features are noise to a dictionary, and statistics of vectors help nobody.
    buffer = io.BytesIO()
    pq.write_table(
        table.replace_schema_metadata(dict(metadata)),
        buffer,
        compression="zstd",
        use_dictionary=["code", "stage"] if "code" in table.column_names else False,
        write_statistics=["sample_id"],
        store_schema=True,
        write_page_checksum=True,
    )
    data = buffer.getvalue()
    return PartFile(
        key=key,
        size_bytes=len(data),
        etag=store.put(key, data),
        checksum=digest_bytes(data).hex(),
        num_rows=table.num_rows,
        rows_digest=rows_digest,
    )


def write_rejects(
    store: ObjectStore, key: str, rejects: Sequence[Reject], attempt: str, run_id: str
) -> PartFile:
    """Write the reject table of one slice and return what proves it."""
    rows = [
        {**{name: getattr(reject, name) for name in REJECTS_SCHEMA.names[:-1]}, "attempt": attempt}
        for reject in rejects
    ]
    digest = MultisetDigest()
    for reject in rejects:
        digest.add_row(reject.sample_id.encode(), reject.code.encode())
    metadata = {"convoy.schema_version": str(REJECTS_SCHEMA_VERSION), "convoy.run_id": run_id}
    part = write_table(store, key, pa.Table.from_pylist(rows, REJECTS_SCHEMA), metadata, digest.hexdigest())
    crash_point(CrashPoint.REJECTS_WRITTEN)
    return part


def read_rejects(store: ObjectStore, manifest: RunManifest) -> pa.Table:
    """All rejects of a published run, in columns of REJECTS_SCHEMA."""
    files = [record.rejects.key for record in manifest.slices if record.rejects]
    tables = [store.open_parquet(key).read().cast(REJECTS_SCHEMA) for key in files]
    return pa.concat_tables([REJECTS_SCHEMA.empty_table(), *tables])


def _digest_features(rows: FeatureRows) -> str:
    digest = MultisetDigest()
    view = str(rows.view).encode()
    for sample_id, vector in zip(rows.sample_ids, rows.features_BD, strict=True):
        digest.add_row(sample_id.encode(), view, vector.tobytes())
    return digest.hexdigest()
