"""Names and versions of the columns that more than one room reads or writes."""

from __future__ import annotations

MANIFEST_SCHEMA_VERSION = 1

# Manifest columns. A sample is an object, a byte range of a tar shard, or a row of a parquet file.
SAMPLE_ID = "sample_id"  # string: unique and stable within the dataset, the sort key of a manifest
URI = "uri"  # string: the object, tar shard or parquet file that holds the bytes
ETAG = "etag"  # string: version of that object when the manifest was frozen
SIZE_BYTES = "size_bytes"  # int64: size of the image's bytes; for parquet rows 0 if not known
OFFSET_BYTES = "offset_bytes"  # int64: where the bytes start inside a tar shard, else null
ROW_INDEX = "row_index"  # int64: row of a parquet file, else null
CONTAINER_FIELD = "container_field"  # string: image column of a parquet file ("image.bytes" for a struct), else ""
CHECKSUM = "checksum"  # string: "md5:<hex>" or "sha256:<hex>" of the image's bytes, or ""
CONTENT_ID = "content_id"  # fixed binary(16): equal only for equal content, known without reading it
LABEL = "label"  # int32: index into the manifest's classes, or null
SPLIT = "split"  # string: train, val or test
WEIGHT = "weight"  # float32: sample weight, 1.0 unless the source says otherwise
