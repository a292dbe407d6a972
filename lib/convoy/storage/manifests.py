"""Manifests: frozen, sorted, fingerprinted lists of samples, in parquet."""

from __future__ import annotations

import hashlib
import io
import json
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field, ValidationError

from convoy.core.config import StrictModel
from convoy.core.errors import DataError
from convoy.core.fingerprints import DIGEST_BYTES, canonical_json
from convoy.core.records import Split
from convoy.core.splits import SplitOptions
from convoy.storage.object_store import ObjectStore

MANIFEST_SCHEMA_VERSION = 1
# Also the rows that a fingerprint hashes at once, so another number makes other fingerprints of large datasets.
ROWS_PER_GROUP = 16_384
_GROUPS_AHEAD = 2

# A sample is a whole object, a byte range of a tar shard (offset_bytes), or a parquet file's row (row_index).
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

_METADATA_KEY = b"convoy.manifest"


class SplitCounts(StrictModel):
    """Samples of one split: all of them, and those of each class in the order of the classes."""

    num_samples: int
    by_class: tuple[int, ...]

    @property
    def num_unlabelled(self) -> int:
        """Samples without a label."""
        return self.num_samples - sum(self.by_class)


class ManifestHeader(StrictModel):
    """What a manifest says of itself, kept as JSON in the file's metadata under `convoy.manifest`.

    `source` is the URI that was frozen, `reading` how, and `splits` by what splits were drawn, null where an older
    Convoy did not keep it; with `incomplete`, the URIs of damaged containers, and `skipped_in`, what by reason is no
    sample in each of the others, they serve the next refresh only.
    """

    schema_version: int = MANIFEST_SCHEMA_VERSION
    fingerprint: str
    num_samples: int
    classes: tuple[str, ...]
    counts: dict[Split, SplitCounts]
    source: str
    reading: dict[str, Any] = Field(default_factory=dict)
    splits: SplitOptions | None = None
    incomplete: tuple[str, ...] = ()
    skipped_in: dict[str, dict[str, int]] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A handle on a manifest in a store: small, pickles, and reads rows only when they are asked for."""

    store: ObjectStore
    key: str
    header: ManifestHeader

    @classmethod
    def open(cls, store: ObjectStore, key: str) -> Manifest:
        """The manifest at `key`. Raises ObjectNotFound, or DataError where the file is no manifest."""
        try:
            metadata = store.open_parquet(key).schema_arrow.metadata or {}
            header = ManifestHeader.model_validate_json(metadata[_METADATA_KEY])
        except (KeyError, ValidationError) as error:
            raise DataError(
                f"the file is not a manifest of schema version {MANIFEST_SCHEMA_VERSION}",
                where=store.uri(key),
                next_step="freeze the dataset again with `convoy dataset`",
            ) from error
        return cls(store=store, key=key, header=header)

    @property
    def uri(self) -> str:
        """Where the manifest lies."""
        return self.store.uri(self.key)

    @property
    def num_samples(self) -> int:
        """Rows of the manifest."""
        return self.header.num_samples

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; a row's label is an index into them."""
        return self.header.classes

    @property
    def fingerprint(self) -> str:
        """What `fingerprint_samples` says of the rows."""
        return self.header.fingerprint

    @property
    def counts(self) -> Mapping[Split, SplitCounts]:
        """Samples by split and class; a split without samples is missing."""
        return self.header.counts

    def iter_batches(
        self, columns: Sequence[str] | None = None, *, splits: Collection[Split] | None = None
    ) -> Iterator[pa.RecordBatch]:
        """The rows in order, in batches of at most ROWS_PER_GROUP; few row groups are in memory at a time.

        None stands for all columns or all splits. A thread reads ahead.
        """
        wanted = list(MANIFEST_SCHEMA.names if columns is None else columns)
        needed = wanted if splits is None else list({*wanted, "split"})
        file = self.store.open_parquet(self.key)
        for group in _read_ahead(file, needed):
            rows = group
            if splits is not None:
                rows = group.filter(pc.is_in(group["split"], pa.array(splits, pa.string())))
            yield from rows.select(wanted).combine_chunks().to_batches()

    def read_table(
        self, columns: Sequence[str] | None = None, *, splits: Collection[Split] | None = None
    ) -> pa.Table:
        """All rows at once, in order: about 250 bytes a row in memory with all columns."""
        wanted = MANIFEST_SCHEMA.names if columns is None else columns
        schema = pa.schema([MANIFEST_SCHEMA.field(name) for name in wanted])
        batches = (batch.cast(schema) for batch in self.iter_batches(wanted, splits=splits))
        return pa.Table.from_batches(batches, schema=schema)


def write_manifest(store: ObjectStore, key: str, samples: pa.Table, header: ManifestHeader) -> str:
    """Write rows of MANIFEST_SCHEMA, sorted by sample_id, with their header; returns the etag of the object.

    Besides the table itself, one row group and the compressed file are in memory.
    Raises DataError for a sample_id that occurs twice.
    """
    return write_groups(store, key, iter_sorted(samples), header)


def write_groups(store: ObjectStore, key: str, groups: Iterable[pa.Table], header: ManifestHeader) -> str:
    """Write rows that come sorted by sample_id as a manifest; returns its etag.

    `groups` are tables of ROWS_PER_GROUP rows, the last of fewer.
    """
    buffer = io.BytesIO()
    schema = MANIFEST_SCHEMA.with_metadata({_METADATA_KEY: canonical_json(header)})
    with pq.ParquetWriter(
        buffer, schema, compression="zstd", write_page_index=True, write_page_checksum=True
    ) as writer:
        for group in groups:
            writer.write_table(group, row_group_size=ROWS_PER_GROUP)
    return store.put(key, buffer.getvalue())


def _read_ahead(file: Any, columns: Sequence[str]) -> Iterator[pa.Table]:
    """The row groups of a parquet file in order; the next one is read while one is in use."""
    # One thread: a ParquetFile may not be read by two at a time.
    with ThreadPoolExecutor(1, thread_name_prefix="manifest") as reader:
        pending = deque[Future[pa.Table]]()
        for group in range(file.num_row_groups):
            pending.append(reader.submit(file.read_row_group, group, columns=columns))
            if len(pending) > _GROUPS_AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def fingerprint_samples(samples: pa.Table, classes: Sequence[str]) -> str:
    """A digest (32 hex digits) of the class list and of each row's id, content, label, split and weight.

    Where the bytes lie is left out, so that a dataset copied to another bucket keeps its fingerprint where
    the store knows checksums; elsewhere content_id depends on the place, and a copy is another version.
    """
    hasher = hashlib.blake2b(canonical_json(list(classes)), digest_size=DIGEST_BYTES)
    for group in iter_sorted(samples):
        names = label_names(group, classes).to_pylist()
        columns = [group[name].to_pylist() for name in ("sample_id", "content_id", "split", "weight")]
        # JSON arrays delimit themselves, so other rows cannot give the same bytes.
        hasher.update(canonical_json([names, *columns]))
    return hasher.hexdigest()


def label_names(samples: pa.Table, classes: Sequence[str]) -> pa.Array | pa.ChunkedArray:
    """The class name of each row, null where it is unlabelled."""
    return pc.take(pa.array(classes, pa.string()), samples["label"])


def iter_sorted(samples: pa.Table) -> Iterator[pa.Table]:
    """The rows sorted by sample_id, in tables of ROWS_PER_GROUP rows, without a sorted copy of the whole.

    Raises DataError for a sample_id that occurs twice.
    """
    schema = samples.schema
    samples = with_long_columns(samples)
    order = pc.sort_indices(samples["sample_id"])
    last_id: Any = None
    for start in range(0, len(order), ROWS_PER_GROUP):
        group = samples.take(order.slice(start, ROWS_PER_GROUP)).cast(schema)
        ids = group["sample_id"].combine_chunks()
        _refuse_equal_neighbours(pa.concat_arrays([pa.array([last_id], pa.string()), ids]))
        last_id = ids[-1].as_py()
        yield group


def with_long_columns(rows: pa.Table) -> pa.Table:
    """The rows in one chunk, whose texts may take more than the 2 GiB that offsets of 32 bits address."""
    fields = [
        one.with_type(pa.large_string()) if pa.types.is_string(one.type) else one for one in rows.schema
    ]
    return rows.cast(pa.schema(fields, rows.schema.metadata)).combine_chunks()


def _refuse_equal_neighbours(ids: pa.Array) -> None:
    doubled = ids[1:].filter(pc.fill_null(pc.equal(ids[1:], ids[:-1]), False))
    if len(doubled):
        raise DataError(
            f"sample ids must be unique, but these occur twice: {json.dumps(doubled[:5].to_pylist())}",
            next_step="rename the samples, or give an `id` column",
        )


def count_samples(samples: pa.Table, num_classes: int) -> dict[Split, SplitCounts]:
    """Rows by split and class; splits without rows are missing."""
    grouped = samples.group_by(["split", "label"]).aggregate([([], "count_all")]).to_pylist()
    counts = {}
    for split in Split:
        here = {row["label"]: row["count_all"] for row in grouped if row["split"] == split}
        if here:
            by_class = tuple(here.get(label, 0) for label in range(num_classes))
            counts[split] = SplitCounts(num_samples=sum(here.values()), by_class=by_class)
    return counts
