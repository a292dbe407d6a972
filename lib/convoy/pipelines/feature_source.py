"""Cached features as the rows of a fit: in memory where they fit, streamed from the cache where they do not."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from convoy.core.errors import DataError
from convoy.core.large_arrays import large_array
from convoy.core.records import codes_in_words
from convoy.storage.feature_cache import FeatureCache, PartIndex, content_id_array
from convoy.storage.feature_reading import FeatureChunk, iter_wanted
from convoy.vision.distillation import Teacher
from convoy.vision.heads import FeatureBatch, FeatureSource, TensorFeatures

# Features are widened to float32 in memory; above this they are read from the cache in every pass.
MEMORY_LIMIT_BYTES = 4 * 2**30


@dataclass(frozen=True, slots=True)
class LabelledRows:
    """Labelled samples in manifest order, and what a teacher says of them."""

    content_ids_N: np.ndarray
    labels_N: np.ndarray
    weights_N: np.ndarray
    teacher: Teacher | None = None

    def __len__(self) -> int:
        return len(self.labels_N)

    @classmethod
    def of(cls, rows: pa.Table, teacher: Teacher | None = None) -> LabelledRows:
        """The rows of a table that has the columns content_id, label and weight, all of them labelled."""
        rows = rows.combine_chunks()
        return cls(
            content_ids_N=content_id_array(rows["content_id"]),
            labels_N=rows["label"].to_numpy().astype(np.int64),
            weights_N=rows["weight"].to_numpy().astype(np.float32),
            teacher=teacher,
        )


def open_features(
    cache: FeatureCache,
    set_ids: Sequence[str],
    rows: LabelledRows,
    *,
    memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
) -> FeatureSource:
    """The features of the rows, once for each set (a set is a view); samples that were rejected do not come."""
    streamed = StreamedFeatures(cache, set_ids, rows)
    if streamed.num_rows * streamed.num_features * 4 > memory_limit_bytes:
        return streamed
    return _in_memory(cache, set_ids, rows, (streamed.num_rows, streamed.num_features))


class StreamedFeatures:
    """A feature source that reads the cache anew in every pass and holds a few parts of it."""

    def __init__(self, cache: FeatureCache, set_ids: Sequence[str], rows: LabelledRows) -> None:
        self._cache = cache
        self._set_ids = set_ids
        self._rows = rows
        chunk = next((chunk for set_id in set_ids for chunk in self._chunks(set_id)), None)
        if chunk is None:
            codes = codes_in_words(cache.count_rejects(set_ids[:1], rows.content_ids_N))
            raise DataError(
                f"none of {len(rows)} images has features: {codes}",
                next_step="see to these images; `convoy cache` lists every reject with its reason",
            )
        self._num_features: int = chunk.features_BD.shape[1]
        self._num_rows = sum(int(_is_cached(cache, set_id, rows).sum()) for set_id in set_ids)

    @property
    def num_rows(self) -> int:
        """Rows in one pass: samples times views."""
        return self._num_rows

    @property
    def num_features(self) -> int:
        """D, the width of a row."""
        return self._num_features

    def __iter__(self) -> Iterator[FeatureBatch]:
        teacher = self._rows.teacher
        for set_id in self._set_ids:
            for chunk in self._chunks(set_id):
                yield FeatureBatch(
                    features_BD=torch.from_numpy(chunk.features_BD).float(),
                    labels_B=torch.from_numpy(self._rows.labels_N[chunk.rows_B]),
                    weights_B=torch.from_numpy(self._rows.weights_N[chunk.rows_B]),
                    soft=None if teacher is None else teacher.targets(chunk.rows_B),
                )

    def _chunks(self, set_id: str) -> Iterator[FeatureChunk]:
        return iter_wanted(self._cache, set_id, self._rows.content_ids_N)


def _in_memory(
    cache: FeatureCache, set_ids: Sequence[str], rows: LabelledRows, shape: tuple[int, int]
) -> TensorFeatures:
    """All rows in manifest order, view by view, so that equal caches give equal fits to the last bit.

    They are held once, on disk where memory is short: see `core.large_arrays`.
    """
    features_ND = large_array(shape, np.float32)
    found_rows: list[np.ndarray] = []
    start = 0
    for set_id in set_ids:
        is_cached_N = _is_cached(cache, set_id, rows)
        places_N = start + np.cumsum(is_cached_N) - 1
        for chunk in iter_wanted(cache, set_id, rows.content_ids_N):
            features_ND[places_N[chunk.rows_B]] = chunk.features_BD
        found_rows.append(np.flatnonzero(is_cached_N))
        start += len(found_rows[-1])
    found = np.concatenate(found_rows)
    return TensorFeatures(
        torch.from_numpy(features_ND),
        torch.from_numpy(rows.labels_N[found]),
        torch.from_numpy(rows.weights_N[found]),
        teacher=None if rows.teacher is None else rows.teacher.take(found),
    )


def _is_cached(cache: FeatureCache, set_id: str, rows: LabelledRows) -> np.ndarray:
    """A boolean mask of the rows that a set has features of."""
    return cache.known_content(set_id).has_rows(pa.array(rows.content_ids_N, pa.binary(16)))


def gather_features(
    cache: FeatureCache, set_id: str, content_ids_N: np.ndarray, *, index: PartIndex | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Float32 features_ND in the order of the ids, and a mask found_N: rows that are not cached stay zero."""
    features_ND = np.empty((len(content_ids_N), 0), np.float32)
    found_N = np.zeros(len(content_ids_N), dtype=bool)
    for chunk in iter_wanted(cache, set_id, content_ids_N, index=index):
        if not features_ND.shape[1]:
            features_ND = np.zeros((len(content_ids_N), chunk.features_BD.shape[1]), np.float32)
        features_ND[chunk.rows_B] = chunk.features_BD
        found_N[chunk.rows_B] = True
    return features_ND, found_N


def count_rejects(cache: FeatureCache, set_ids: Collection[str], rows: pa.Table) -> dict[str, int]:
    """Why some rows have no features in one of the sets, whichever job found that out: how many for each code."""
    content_ids = rows["content_id"].combine_chunks()
    found_N = np.logical_and.reduce([cache.known_content(one).has_rows(content_ids) for one in set_ids])
    return cache.count_rejects(set_ids, content_id_array(content_ids)[~found_N])
