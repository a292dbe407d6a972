"""The labelled rows that a training sees."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import NonNegativeInt, PositiveInt

from convoy.core.config import StrictModel
from convoy.core.errors import DataError
from convoy.core.randomness import unit_interval
from convoy.core.records import Split
from convoy.storage.manifests import Manifest


class RowLimit(StrictModel):
    """At most so many training images of each class, drawn by a hash of sample id and seed.

    For learning curves and few-shot measurements. A larger limit with the same seed only adds images.
    """

    max_per_class: PositiveInt | None = None
    seed: NonNegativeInt = 0


def read_split(manifest: Manifest, split: Split, limit: RowLimit | None = None) -> pa.Table:
    """The labelled rows of a split with all columns of the manifest, in its order: about 250 bytes a row.

    Raises DataError where there is none.
    """
    rows = manifest.read_table(splits=[split])
    rows = rows.filter(pc.is_valid(rows["label"]))
    if not rows.num_rows:
        raise DataError(
            f"no labelled sample in split {split.value}",
            where=manifest.uri,
            next_step="label the dataset, or choose another split",
        )
    return rows if limit is None or limit.max_per_class is None else _limited(rows, limit)


def _limited(rows: pa.Table, limit: RowLimit) -> pa.Table:
    draws_N = np.array([unit_interval(limit.seed, "rows", name) for name in rows["sample_id"].to_pylist()])
    labels_N = rows["label"].to_numpy()
    kept = [
        np.flatnonzero(labels_N == label)[np.argsort(draws_N[labels_N == label])[: limit.max_per_class]]
        for label in np.unique(labels_N)
    ]
    return rows.take(pa.array(np.sort(np.concatenate(kept))))


def count_classes(rows: pa.Table, classes: Sequence[str]) -> list[int]:
    """Rows of each class. Raises DataError for classes without any: a network cannot learn them."""
    counts = np.bincount(rows["label"].to_numpy(), minlength=len(classes))
    empty = [name for name, count in zip(classes, counts, strict=True) if not count]
    if empty:
        raise DataError(
            f"{len(empty)} classes have no training image: {', '.join(empty[:5])}",
            next_step="add images of them, or freeze the dataset without these classes",
        )
    return [int(count) for count in counts]
