"""Freezing a run's input: the rows of a manifest that lack outputs, cut into slices, in bounded memory."""

from __future__ import annotations

import io
import secrets
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from convoy.core.crash_points import CrashPoint, crash_point
from convoy.core.errors import StorageError
from convoy.storage.feature_cache import KnownContent
from convoy.storage.leases import RunLease
from convoy.storage.manifests import MANIFEST_SCHEMA
from convoy.storage.object_store import ObjectStore
from convoy.storage.runs import INPUT, SLICES_PER_INPUT_SHARD, RunFolder, RunRecord, SliceGroup

MIN_SLICES = 8
# The work of networks is shared out more finely: the last slice of a worker is what the others wait for at the end.
MAX_SLICES_BY_WORK = 32
_WORK_A_SLICE_S = 4.0
# From this many on slices grow instead, as the driver holds a record of each.
MAX_SLICES = 32_768
MAX_SLICE_ROWS = 2048
# The others differ from row to row, so a dictionary of them is only work.
_DICTIONARY_COLUMNS = ["container_field", "split"]


def slice_rows_for(num_rows: int, batch_size: int, forward_s: float = 0.0) -> int:
    """Rows a slice: enough slices to share out and to resume by, few enough to cost nothing; whole batches.

    MIN_SLICES or more; of work that takes two cores `forward_s` seconds in networks up to MAX_SLICES_BY_WORK, if each
    has some seconds of it. At most MAX_SLICE_ROWS, until that would be more than MAX_SLICES slices.
    """
    num_slices = max(MIN_SLICES, min(int(forward_s / _WORK_A_SLICE_S), MAX_SLICES_BY_WORK))
    wanted = max(min(-(-num_rows // num_slices), MAX_SLICE_ROWS), -(-num_rows // MAX_SLICES))
    return max(-(-wanted // batch_size), 1) * batch_size


def missing_rows(
    batches: Iterable[pa.RecordBatch | pa.Table], known: Mapping[str, KnownContent]
) -> Iterator[tuple[tuple[str, ...], pa.Table]]:
    """For each batch of a manifest, its rows by the sets they lack; rows that lack nothing are left out."""
    set_ids = list(known)
    for batch in batches:
        table = pa.Table.from_batches([batch]) if isinstance(batch, pa.RecordBatch) else batch
        lacks = np.stack([known[set_id].missing(table["content_id"]) for set_id in set_ids])
        patterns, pattern_of_row = np.unique(lacks, axis=1, return_inverse=True)
        for index, pattern in enumerate(patterns.T):
            if pattern.any():
                lacking = tuple(set_id for set_id, lack in zip(set_ids, pattern, strict=True) if lack)
                yield lacking, table.filter(pa.array(pattern_of_row.reshape(-1) == index))


def freeze_input(
    folder: RunFolder, rows: Iterable[tuple[tuple[str, ...], pa.Table]], *, slice_rows: int
) -> tuple[SliceGroup, ...]:
    """Write the input of a run in slices, one parquet row group each, and return the groups.

    In files that no other attempt writes: a driver that hung over it may go on beside the one that took the run over.
    """
    attempt = secrets.token_hex(4)
    writers: dict[tuple[str, ...], _GroupWriter] = {}
    with ThreadPoolExecutor(1, thread_name_prefix="input") as pool:
        uploads = _Uploads(folder.store, pool)
        for outputs, table in rows:
            if outputs not in writers:
                writers[outputs] = _GroupWriter(folder, uploads, len(writers), attempt, slice_rows)
            writers[outputs].add(table)
        for writer in writers.values():
            writer.close()
        uploads.wait()
    crash_point(CrashPoint.INPUT_FROZEN)
    return tuple(
        SliceGroup(
            outputs=outputs,
            num_rows=writer.num_rows,
            num_slices=writer.num_slices,
            attempt=attempt,
            slice_rows=slice_rows,
        )
        for outputs, writer in writers.items()
    )


def write_frozen_record(folder: RunFolder, record: RunRecord, lease: RunLease, *, num_rows: int) -> RunRecord:
    """Write the record of a run whose input was frozen, and return the one that counts, as `write_record` does.

    Raises StorageError unless the input has the `num_rows` rows that were asked for; LeaseLost or RunCancelled where
    the run is not this driver's any more.
    """
    if record.num_inputs != num_rows:
        raise StorageError(
            f"{record.num_inputs} rows were frozen of {num_rows} that were asked for",
            where=folder.key(INPUT),
            next_step="run the same command again: the input is frozen anew",
        )
    lease.confirm()
    return folder.write_record(record)


@dataclass(slots=True)
class _Uploads:
    """Puts one object after the other, each while the next one is made."""

    store: ObjectStore
    pool: ThreadPoolExecutor
    _pending: Future[str] | None = None

    def put(self, key: str, data: bytes) -> None:
        self.wait()
        self._pending = self.pool.submit(self.store.put, key, data)

    def wait(self) -> None:
        if self._pending is not None:
            self._pending.result()


@dataclass(slots=True)
class _GroupWriter:
    """Cuts the rows of one group into slices and puts each shard of slices when it is full."""

    folder: RunFolder
    uploads: _Uploads
    group: int
    attempt: str
    slice_rows: int
    num_rows: int = 0
    num_slices: int = 0
    _rest: pa.Table = field(default_factory=MANIFEST_SCHEMA.empty_table)
    _shard: io.BytesIO = field(default_factory=io.BytesIO)
    _writer: pq.ParquetWriter | None = None

    def add(self, table: pa.Table) -> None:
        rest = pa.concat_tables([self._rest, table.cast(MANIFEST_SCHEMA)])
        while rest.num_rows >= self.slice_rows:
            self._write_slice(rest.slice(0, self.slice_rows))
            rest = rest.slice(self.slice_rows)
        self._rest = rest.combine_chunks()

    def close(self) -> None:
        if self._rest.num_rows:
            self._write_slice(self._rest)
        self._put_shard()

    def _write_slice(self, table: pa.Table) -> None:
        if self._writer is None:
            self._shard = io.BytesIO()
            self._writer = pq.ParquetWriter(
                self._shard,
                MANIFEST_SCHEMA,
                compression="zstd",
                use_dictionary=_DICTIONARY_COLUMNS,
                write_statistics=False,
                write_page_checksum=True,
            )
        self._writer.write_table(table, row_group_size=table.num_rows)
        self.num_rows += table.num_rows
        self.num_slices += 1
        if not self.num_slices % SLICES_PER_INPUT_SHARD:
            self._put_shard()

    def _put_shard(self) -> None:
        if self._writer is None:
            return
        self._writer.close()
        self._writer = None
        shard = (self.num_slices - 1) // SLICES_PER_INPUT_SHARD
        self.uploads.put(self.folder.input_key(self.group, shard, self.attempt), self._shard.getvalue())
