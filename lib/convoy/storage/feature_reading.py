"""Reading the cache back: features aligned with the rows of a manifest, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from convoy.storage.feature_cache import FeatureCache, PartIndex, content_id_array


def features_array(column: pa.ChunkedArray) -> np.ndarray:
    """The (rows, dimension) array of a features column."""
    chunks = [
        chunk.flatten().to_numpy(zero_copy_only=False).reshape(len(chunk), -1)
        for chunk in column.chunks
        if len(chunk)
    ]
    if not chunks:
        return np.empty((0, column.type.list_size), column.type.value_type.to_pandas_dtype())
    return chunks[0] if len(chunks) == 1 else np.concatenate(chunks)


@dataclass(frozen=True, slots=True)
class FeatureChunk:
    """Features of some wanted rows: `features_BD[i]` belongs to the wanted row `rows_B[i]`."""

    rows_B: np.ndarray
    features_BD: np.ndarray


def iter_wanted(
    cache: FeatureCache, set_id: str, content_ids: np.ndarray, *, index: PartIndex | None = None
) -> Iterator[FeatureChunk]:
    """Features of the wanted content ids, a committed part at a time, in a fixed order.

    Every wanted row comes at most once, also where two rows want the same content, or where two runs computed
    it: the first part that has it wins. Rows without features do not come. `index` is worth its memory for many looks.
    """
    order = np.argsort(content_ids, kind="stable")
    sorted_ids = content_ids[order]
    served = np.zeros(len(content_ids), dtype=bool)
    for table in cache.iter_parts(set_id, ["content_id", "features"], having=sorted_ids, index=index):
        part_ids = content_id_array(table["content_id"])
        first = np.searchsorted(sorted_ids, part_ids, "left")
        count = np.searchsorted(sorted_ids, part_ids, "right") - first
        part_rows = np.repeat(np.arange(len(part_ids)), count)
        # The k-th repetition of a part row is the k-th wanted row with its content.
        repetition = np.arange(len(part_rows)) - np.repeat(np.cumsum(count) - count, count)
        wanted_rows = order[first[part_rows] + repetition]
        _, unique = np.unique(wanted_rows, return_index=True)
        fresh = np.sort(unique[~served[wanted_rows[unique]]])
        served[wanted_rows[fresh]] = True
        if len(fresh):
            yield FeatureChunk(wanted_rows[fresh], features_array(table["features"])[part_rows[fresh]])
