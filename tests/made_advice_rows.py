"""A frozen dataset that is nothing but its manifest, with so many rows of each class in each split."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from convoy.core.records import Split
from convoy.storage.local_store import LocalStore
from convoy.storage.manifests import MANIFEST_SCHEMA, Manifest
from made_manifests import write_samples
from made_runs import content_id


def frozen_rows(
    folder: Path,
    counts: dict[Split, tuple[int, ...]],
    classes: tuple[str, ...],
    *,
    unlabelled: tuple[Split, ...] = (),
    weigh: Callable[[str], float] = lambda name: 1.0,
) -> Manifest:
    """A manifest with so many rows of each class in each split; those of some splits do not say which.

    `weigh` says the weight of a row by its name, `<split>/<label>/<number>`.
    """
    rows = [
        {
            "sample_id": (name := f"{split.value}/{label}/{index:03d}"),
            "uri": f"/data/{name}",
            "etag": "1",
            "content_id": content_id(name),
            "label": None if split in unlabelled else label,
            "split": split.value,
            "weight": weigh(name),
        }
        for split, by_class in counts.items()
        for label, number in enumerate(by_class)
        for index in range(number)
    ]
    table = pa.Table.from_pylist(rows, MANIFEST_SCHEMA).sort_by("sample_id")
    return write_samples(LocalStore(str(folder)), table, classes)
