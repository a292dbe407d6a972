"""Manifests: frozen, sorted, fingerprinted lists of samples, in parquet."""

from __future__ import annotations

import pyarrow as pa

MANIFEST_SCHEMA_VERSION = 1

# A sample is a whole object, a byte range of a tar shard (offset_bytes), or a row of a parquet file (row_index).
MANIFEST_SCHEMA = pa.schema(
    [
        # Unique and stable within the dataset; the sort key, in the order of its UTF-8 bytes.
        pa.field("sample_id", pa.string(), nullable=False),
        # The object, tar shard or parquet file that holds the bytes: an absolute path or s3:// URI.
        pa.field("uri", pa.string(), nullable=False),
        # Version of that object when the manifest was frozen.
        pa.field("etag", pa.string(), nullable=False),
        # Size of the image's own bytes; null where it is not known without reading (parquet rows).
        pa.field("size_bytes", pa.int64()),
        pa.field("offset_bytes", pa.int64()),
        pa.field("row_index", pa.int64()),
        # The image column of a parquet file: "image" for plain binary, "image.bytes" for struct{bytes, path}.
        pa.field("container_field", pa.string()),
        # "md5:<hex>" or "sha256:<hex>" of the image's bytes where it is known, else null.
        pa.field("checksum", pa.string()),
        # Equal only for equal content, and known without reading it.
        pa.field("content_id", pa.binary(16), nullable=False),
        # Index into the dataset's classes; null for unlabelled samples.
        pa.field("label", pa.int32()),
        pa.field("split", pa.string(), nullable=False),
        pa.field("weight", pa.float32(), nullable=False),
    ]
)
