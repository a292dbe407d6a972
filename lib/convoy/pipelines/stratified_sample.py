"""A sample of a dataset in which every class has a place before any has two."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from convoy.core.errors import DataError
from convoy.core.randomness import unit_interval
from convoy.core.records import Split
from convoy.storage.manifests import MANIFEST_SCHEMA, Manifest

_UNLABELLED = -1


def stratified_rows(
    manifest: Manifest, num_rows: int, *, splits: Collection[Split], seed: int = 0, purpose: str = "sample"
) -> pa.Table:
    """Rows of some splits: one of each class, unlabelled ones being a class too, then a second of each, and so on.

    Which ones is up to a hash of seed, purpose and sample id, so a larger sample only adds rows. In memory are the rows
    of the sample and of one batch. Raises DataError where the splits have no row.
    """
    chosen, draws_N = MANIFEST_SCHEMA.empty_table(), np.empty(0)
    for batch in manifest.iter_batches(splits=splits):
        chosen = pa.concat_tables([chosen, pa.Table.from_batches([batch]).cast(MANIFEST_SCHEMA)])
        new_B = [unit_interval(seed, purpose, name) for name in batch["sample_id"].to_pylist()]
        draws_N = np.concatenate([draws_N, new_B])
        # What comes after so many rows now comes after as many of any larger set.
        kept = np.lexsort((draws_N, _place_in_class(chosen, draws_N)))[:num_rows]
        chosen, draws_N = chosen.take(pa.array(kept)).combine_chunks(), draws_N[kept]
    if not chosen.num_rows:
        raise DataError(
            f"no sample in split {', '.join(sorted(splits))}",
            where=manifest.uri,
            next_step="choose another split with --set splits=[...]",
        )
    return chosen


def evenly_spread_rows(manifest: Manifest, most: int, *, splits: Collection[Split] | None = None) -> pa.Table:
    """At most so many rows from all over the manifest or some splits of it, which it has, as evenly spaced as can be.

    They are in the manifest's order; they and one batch are in memory.
    """
    chosen = manifest.counts if splits is None else splits
    num_samples = sum(manifest.counts[split].num_samples for split in chosen)
    wanted_N = np.linspace(0, num_samples - 1, min(most, num_samples)).round().astype(np.int64)
    parts, start = [MANIFEST_SCHEMA.empty_table()], 0
    for batch in manifest.iter_batches(splits=splits):
        end = start + batch.num_rows
        places_N = wanted_N[(wanted_N >= start) & (wanted_N < end)] - start
        parts.append(pa.Table.from_batches([batch]).cast(MANIFEST_SCHEMA).take(pa.array(places_N)))
        start = end
    return pa.concat_tables(parts).combine_chunks()


def rows_by_sample_id(manifest: Manifest, sample_ids: Sequence[str]) -> pa.Table:
    """The rows of some samples, in the order of the manifest. DataError for one that the dataset does not have."""
    wanted = pa.array(sample_ids, pa.string())
    found = [
        pa.Table.from_batches([batch]).cast(MANIFEST_SCHEMA).filter(pc.is_in(batch["sample_id"], wanted))
        for batch in manifest.iter_batches()
    ]
    rows = pa.concat_tables([MANIFEST_SCHEMA.empty_table(), *found]).combine_chunks()
    unknown = sorted(set(sample_ids) - set(rows["sample_id"].to_pylist()))
    if unknown:
        raise DataError(
            f"the dataset has no sample '{unknown[0]}'" + (f" ({len(unknown)} such)" if unknown[1:] else ""),
            where=manifest.uri,
            next_step="name samples as the manifest does: by their path below the source",
        )
    return rows


def labels_of(rows: pa.Table) -> NDArray[np.int64]:
    """The label of each row, -1 where it has none."""
    labels_N: NDArray[np.int64] = (
        rows["label"].combine_chunks().fill_null(_UNLABELLED).to_numpy(zero_copy_only=False).astype(np.int64)
    )
    return labels_N


def _place_in_class(rows: pa.Table, draws_N: NDArray[np.float64]) -> NDArray[np.int64]:
    """How many rows of the same label have a lower draw."""
    labels_N = labels_of(rows)
    order = np.lexsort((draws_N, labels_N))
    first_of_class = np.searchsorted(labels_N[order], labels_N[order])
    places_N = np.empty(len(order), np.int64)
    places_N[order] = np.arange(len(order)) - first_of_class
    return places_N
