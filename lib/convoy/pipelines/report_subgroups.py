"""How good predictions are on parts of the data that everybody has: splits, sizes and kinds of files."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from convoy.core.config import StrictModel
from convoy.core.errors import ConvoyError
from convoy.core.statistics import Interval, wilson_interval
from convoy.pipelines.report_file_kinds import file_kinds
from convoy.storage.commits import RunManifest, SliceRecord
from convoy.storage.predictions import PREDICTIONS
from convoy.storage.runs import RunFolder

# Smaller groups say nothing, and beyond so many rows the second reading takes minutes.
_MIN_ROWS, _MAX_ROWS = 20, 1_000_000
_MAX_GROUPS = 50
_LARGEST_POWER = 62


class Subgroup(StrictModel):
    """Labelled rows that have something in common, and how many of them are right, with Wilson's interval."""

    axis: str
    value: str
    rows: int
    top1: Interval


def summarise_subgroups(folder: RunFolder, manifest: RunManifest) -> list[Subgroup]:
    """Groups of 20 labelled rows or more, on each axis that has two of them; none beyond a million rows.

    On an axis with more of them the 50 largest: names like `photo.1234` would make a kind of file of each number.
    """
    if manifest.num_results > _MAX_ROWS:
        return []
    rows: Counter[tuple[str, int, str]] = Counter()
    right: Counter[tuple[str, int, str]] = Counter()
    for record in manifest.slices:
        try:
            inputs = folder.read_slice(record.slice)
        except (ConvoyError, OSError):
            continue
        for table in _labelled(folder, record):
            _count(table, inputs, rows, right)
    large: dict[tuple[str, int, str], int] = {}
    axes: Counter[str] = Counter()
    for key, count in rows.most_common():
        if count >= _MIN_ROWS and axes[key[0]] < _MAX_GROUPS:
            large[key] = count
            axes[key[0]] += 1
    return [
        Subgroup(axis=key[0], value=key[2], rows=large[key], top1=wilson_interval(right[key], large[key]))
        for key in sorted(large)
        if axes[key[0]] > 1
    ]


def _labelled(folder: RunFolder, record: SliceRecord) -> list[pa.Table]:
    keys = [part.key for output, part in sorted(record.parts.items()) if output.startswith(PREDICTIONS)]
    tables = [folder.store.open_parquet(key).read(columns=["sample_id", "label", "pred"]) for key in keys]
    return [table.filter(pc.is_valid(table["label"])) for table in tables]


def _count(
    table: pa.Table,
    inputs: pa.Table,
    rows: Counter[tuple[str, int, str]],
    right: Counter[tuple[str, int, str]],
) -> None:
    """Add the rows of a part to the groups that they are in. Keys are axis, order and value."""
    places = pc.index_in(table["sample_id"], value_set=inputs["sample_id"].combine_chunks())
    known = pc.is_valid(places)
    table, found = table.filter(known), inputs.take(places.filter(known))
    right_N = pc.equal(table["label"], table["pred"]).to_numpy()
    for keys in (_splits(found), _sizes(found), _kinds(found)):
        rows.update(keys)
        right.update(key for key, is_right in zip(keys, right_N.tolist(), strict=True) if is_right)


def _splits(found: pa.Table) -> list[tuple[str, int, str]]:
    return [("split", 0, split) for split in found["split"].to_pylist()]


def _sizes(found: pa.Table) -> list[tuple[str, int, str]]:
    sizes_N = found["size_bytes"].combine_chunks().fill_null(0).to_numpy(zero_copy_only=False)
    powers_N = np.floor(np.log2(np.clip(sizes_N, 1, 2**_LARGEST_POWER))).astype(int)
    return [
        ("size of the file", power, f"{2**power:,} to {2 ** (power + 1):,} bytes")
        if size
        else ("size of the file", -1, "unknown")
        for power, size in zip(powers_N.tolist(), sizes_N.tolist(), strict=True)
    ]


def _kinds(found: pa.Table) -> list[tuple[str, int, str]]:
    return [("kind of file", 0, kind) for kind in file_kinds(found)]
