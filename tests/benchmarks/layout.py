"""`convoy bench layout`: how features should lie in parquet, so that they are small and come back into torch fast.

Times are of the processor, on one thread, so that other work on the machine hardly changes them.

    python tests/benchmarks/layout.py [key=value ...]

Progress goes to stderr; the last line on stdout is the report as JSON. The keys are the fields of `LayoutBench`.
"""

from __future__ import annotations

import io
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from machine import describe_machine, machine_facts
from measuring import BenchSettings, run_benchmark, say
from pydantic import Field

from convoy.core.errors import ConvoyError
from convoy.storage.feature_reading import features_array
from convoy.storage.local_store import LocalStore
from convoy.storage.parts import FeatureRows, write_features
from convoy.storage.run_input import MAX_SLICE_ROWS
from convoy.vision.head_config import Standardisation
from convoy.vision.head_objectives import LinearObjective, measure_features, softmax_loss
from convoy.vision.heads import TensorFeatures

_NUM_CLASSES = 100


class Layout(StrEnum):
    """The type of the column."""

    FIXED_FLOAT16 = "fixed_size_list float16"
    FIXED_FLOAT32 = "fixed_size_list float32"
    LIST_FLOAT32 = "list float32"
    BYTES_FLOAT16 = "fixed_size_binary float16"


class Codec(StrEnum):
    """How the column's pages are encoded and compressed."""

    NONE = "none"
    ZSTD_1 = "zstd 1"
    ZSTD_3 = "zstd 3"
    SPLIT_ZSTD_1 = "byte_stream_split, zstd 1"


_WRITE_OPTIONS: dict[Codec, dict[str, Any]] = {
    Codec.NONE: {"compression": "none"},
    Codec.ZSTD_1: {"compression": "zstd", "compression_level": 1},
    Codec.ZSTD_3: {"compression": "zstd", "compression_level": 3},
    Codec.SPLIT_ZSTD_1: {"compression": "zstd", "compression_level": 1, "use_byte_stream_split": True},
}


class LayoutBench(BenchSettings):
    """What is measured: `rows` features of width `dim`, in parts of `part_rows`, `repeats` times, all in turn.

    `results` is a Markdown file to write.
    """

    rows: int = Field(default=100_000, gt=0)
    dim: int = Field(default=512, gt=0)
    part_rows: int = Field(default=MAX_SLICE_ROWS, gt=0)
    repeats: int = Field(default=5, gt=0)
    seed: int = Field(default=0, ge=0)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to store features."""

    layout: Layout
    codec: Codec

    def encode(self, features_BD: np.ndarray) -> bytes:
        """A parquet file of float32 features."""
        column = _column(self.layout, features_BD)
        schema = pa.schema([pa.field("features", column.type, nullable=False)])
        table, buffer = pa.Table.from_arrays([column], schema=schema), io.BytesIO()
        pq.write_table(
            table, buffer, use_dictionary=False, write_statistics=False, **_WRITE_OPTIONS[self.codec]
        )
        return buffer.getvalue()

    def decode(self, column: pa.ChunkedArray) -> torch.Tensor:
        """A column as float32 features [B, D]."""
        if self.layout is Layout.BYTES_FLOAT16:
            raw = column.combine_chunks().buffers()[1]
            stored_BD = np.frombuffer(raw, np.float16).reshape(len(column), -1)
        else:
            stored_BD = features_array(column)
        return torch.from_numpy(stored_BD).float()


def _column(layout: Layout, features_BD: np.ndarray) -> pa.Array:
    num_rows, dim = features_BD.shape
    is_wide = layout in {Layout.FIXED_FLOAT32, Layout.LIST_FLOAT32}
    item = pa.field("item", pa.float32() if is_wide else pa.float16(), nullable=False)
    stored_BD = np.ascontiguousarray(features_BD, np.float32 if is_wide else np.float16)
    if layout is Layout.BYTES_FLOAT16:
        raw = pa.py_buffer(stored_BD)
        return pa.FixedSizeBinaryArray.from_buffers(pa.binary(2 * dim), num_rows, [None, raw])
    values = pa.array(stored_BD.reshape(-1))
    if layout is Layout.LIST_FLOAT32:
        offsets = pa.array(np.arange(num_rows + 1, dtype=np.int32) * dim)
        return pa.ListArray.from_arrays(offsets, values, type=pa.list_(item))
    return pa.FixedSizeListArray.from_arrays(values, type=pa.list_(item, dim))


@dataclass(slots=True)
class Timings:
    """CPU seconds over all parts, one entry a repeat."""

    write_s: list[float] = field(default_factory=list)
    read_s: list[float] = field(default_factory=list)


class LayoutComparison:
    """All candidates over the same features, each as the files of one folder; files are in the page cache."""

    def __init__(self, settings: LayoutBench, folder: str) -> None:
        self._store = LocalStore(folder)
        self._features_ND = made_features(settings)
        self._starts = range(0, settings.rows, settings.part_rows)
        self._part_rows = settings.part_rows

    def write(self, candidate: Candidate) -> float:
        """CPU seconds to encode all parts; what the store takes is not in it."""
        seconds = 0.0
        for start in self._starts:
            part_BD = self._features_ND[start : start + self._part_rows]
            started_s = time.process_time()
            data = candidate.encode(part_BD)
            seconds += time.process_time() - started_s
            self._store.put(self._key(candidate, start), data)
        return seconds

    def read(self, candidate: Candidate) -> float:
        """CPU seconds to read all parts into float32 tensors, one after the other."""
        started_s = time.process_time()
        for start in self._starts:
            self._read_part(candidate, start)
        return time.process_time() - started_s

    def check(self, candidate: Candidate) -> None:
        """Raise ConvoyError unless the first part comes back as it was, rounded to what is stored."""
        expected_BD = self._features_ND[: self._part_rows]
        if candidate.layout in {Layout.FIXED_FLOAT16, Layout.BYTES_FLOAT16}:
            expected_BD = expected_BD.astype(np.float16).astype(np.float32)
        if not np.array_equal(self._read_part(candidate, 0).numpy(), expected_BD):
            raise ConvoyError("features came back changed", where=repr(candidate))

    def bytes_per_row(self, candidate: Candidate) -> float:
        """Size of the files."""
        sizes = (self._store.head(self._key(candidate, start)).size_bytes for start in self._starts)
        return sum(sizes) / len(self._features_ND)

    def read_elsewhere(self, candidate: Candidate) -> dict[str, str]:
        """The type that other libraries give the column, or why they cannot read it."""
        path = self._store.uri(self._key(candidate, 0))
        first_D = self._read_part(candidate, 0)[0].numpy()
        return {name: _describe(read, path, first_D) for name, read in _READERS.items()}

    def fit_rows_per_s(self) -> float:
        """What a streamed fit asks for: rows a CPU second through one evaluation of its objective, in memory."""
        labels_N = torch.arange(len(self._features_ND)) % _NUM_CLASSES
        source = TensorFeatures(torch.from_numpy(self._features_ND), labels_N)
        scale = measure_features(source, num_classes=_NUM_CLASSES, standardisation=Standardisation.NONE)
        objective = LinearObjective(source, scale, softmax_loss, num_classes=_NUM_CLASSES)
        started_s = time.process_time()
        objective.value_and_gradient(np.zeros(objective.num_parameters), 1.0)
        return source.num_rows / (time.process_time() - started_s)

    def convoy_writes(self) -> dict[str, str]:
        """How the library itself lays out features now."""
        part_BD = self._features_ND[: self._part_rows].astype(np.float16)
        names = [str(index) for index in range(len(part_BD))]
        ids = [bytes(16)] * len(part_BD)
        rows = FeatureRows(
            sample_ids=names, content_ids=ids, content_digests=ids, view=0, features_BD=part_BD
        )
        write_features(self._store, "convoy.parquet", rows, {})
        file = self._store.open_parquet("convoy.parquet")
        group = file.metadata.row_group(0)
        chunk = next(
            column
            for column in map(group.column, range(group.num_columns))
            if column.path_in_schema.startswith("features")
        )
        return {
            "type": str(file.schema_arrow.field("features").type),
            "compression": chunk.compression,
            "encodings": ", ".join(chunk.encodings),
        }

    def _read_part(self, candidate: Candidate, start: int) -> torch.Tensor:
        table = self._store.open_parquet(self._key(candidate, start)).read(columns=["features"])
        return candidate.decode(table["features"])

    def _key(self, candidate: Candidate, start: int) -> str:
        return f"{candidate.layout.name}-{candidate.codec.name}/{start:09d}.parquet"


def made_features(settings: LayoutBench) -> np.ndarray:
    """Float32 activations as a ReLU leaves them: half are zero, the others spread as a lognormal."""
    random = np.random.default_rng(settings.seed)
    features_ND = random.lognormal(-1.0, 1.0, (settings.rows, settings.dim)).astype(np.float32)
    features_ND[random.random(features_ND.shape, np.float32) < 0.5] = 0.0
    return features_ND


def _by_duckdb(path: str) -> tuple[str, Any]:
    rows = duckdb.sql(f"select features from '{path}' limit 1")
    return str(rows.types[0]), rows.fetchall()[0][0]


def _by_polars(path: str) -> tuple[str, Any]:
    column = pl.read_parquet(path)["features"]
    return str(column.dtype), column[0]


def _by_pandas(path: str) -> tuple[str, Any]:
    value = pd.read_parquet(path)["features"][0]
    return f"{type(value).__name__} {getattr(value, 'dtype', '')}".strip(), value


_READERS: dict[str, Callable[[str], tuple[str, Any]]] = {
    "duckdb": _by_duckdb,
    "polars": _by_polars,
    "pandas": _by_pandas,
}


def _describe(read: Callable[[str], tuple[str, Any]], path: str, expected_D: np.ndarray) -> str:
    """The type that a library reads, marked where it is not the vector; each library has errors of its own."""
    try:
        name, value = read(path)
    except Exception as error:
        return f"cannot read it: {type(error).__name__}"
    is_vector = not isinstance(value, bytes) and np.array_equal(np.asarray(value, np.float32), expected_D)
    return name if is_vector else f"{name}, no vector"


def run_layout_bench(settings: LayoutBench) -> dict[str, Any]:
    """How the library writes features now, how fast a fit takes them, and what every candidate costs."""
    torch.set_num_threads(1)
    # Arrow's memory is read-only, which torch warns of; the rows are only read.
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    machine = machine_facts()
    candidates = [Candidate(layout, codec) for layout, codec in product(Layout, Codec)]
    timings: dict[Candidate, Timings] = defaultdict(Timings)
    with TemporaryDirectory(prefix="convoy-bench-layout-") as folder:
        comparison = LayoutComparison(settings, folder)
        for repeat in range(settings.repeats):
            say(f"repeat {repeat + 1} of {settings.repeats}")
            for candidate in candidates:
                timings[candidate].write_s.append(comparison.write(candidate))
                comparison.check(candidate)
                timings[candidate].read_s.append(comparison.read(candidate))
        found = [_report(settings, comparison, one, timings[one]) for one in candidates]
        return {
            "convoy_writes": comparison.convoy_writes(),
            "fit_rows_per_s": comparison.fit_rows_per_s(),
            "candidates": found,
            "machine": machine,
            "settings": settings.model_dump(mode="json"),
        }


def _report(
    settings: LayoutBench, comparison: LayoutComparison, candidate: Candidate, timings: Timings
) -> dict[str, Any]:
    float32_mb = settings.rows * settings.dim * 4 / 1e6
    return {
        "layout": candidate.layout.value,
        "codec": candidate.codec.value,
        "bytes_per_row": comparison.bytes_per_row(candidate),
        # Of float32 as it comes in, so that all candidates are paid for the same work.
        "write_mb_per_s": float32_mb / statistics.median(timings.write_s),
        "read_rows_per_s": settings.rows / statistics.median(timings.read_s),
        "elsewhere": comparison.read_elsewhere(candidate),
    }


def write_page(path: Path, report: dict[str, Any]) -> None:
    """Write the report as Markdown."""
    path.write_text("\n".join(_page(report)) + "\n", encoding="utf-8")


def _page(report: dict[str, Any]) -> Iterator[str]:
    settings, writes = report["settings"], report["convoy_writes"]
    yield "# `convoy bench layout`"
    yield ""
    yield (
        f"{settings['rows']} made features of width {settings['dim']}, half of them zero, in parts of "
        f"{settings['part_rows']} rows; {settings['repeats']} repeats in turn, medians. One part at a time, from "
        "the page cache to a float32 tensor. Writing is encoding alone, in MB of float32 that come in. Seconds are "
        "CPU seconds of one thread."
    )
    yield ""
    yield f"- Convoy writes: {writes['type']}, {writes['compression']}, {writes['encodings']}"
    yield f"- a softmax fit of {_NUM_CLASSES} classes takes {report['fit_rows_per_s']:.0f} rows/s"
    yield from describe_machine(report["machine"])
    yield ""
    yield "| layout | codec | bytes a row | write MB/s | read rows/s | DuckDB | Polars | pandas |"
    yield "| --- | --- | ---: | ---: | ---: | --- | --- | --- |"
    for one in report["candidates"]:
        numbers = ("bytes_per_row", "write_mb_per_s", "read_rows_per_s")
        cells = [one["layout"], one["codec"], *(f"{one[name]:.0f}" for name in numbers)]
        yield f"| {' | '.join([*cells, *one['elsewhere'].values()])} |"


if __name__ == "__main__":
    run_benchmark(LayoutBench, run_layout_bench, write_page)
