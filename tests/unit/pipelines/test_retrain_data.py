"""The rows of a retraining: which judge models, and that no training chose by them."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from convoy.core.errors import DataError
from convoy.core.records import Split
from convoy.pipelines.retrain_data import open_rows
from convoy.storage.local_store import LocalStore
from convoy.storage.manifests import MANIFEST_SCHEMA, Manifest
from convoy.storage.retrains import RetrainFolder
from made_manifests import write_samples

CLASSES = ("cat", "dog")
TRAIN, VAL, TEST = Split.TRAIN, Split.VAL, Split.TEST


def version(folder: Path, name: str, *rows: tuple[str, Split]) -> Manifest:
    """A version of a dataset from the content and the split of its rows, all of them cats."""
    samples = pa.Table.from_pylist(
        [
            {
                "sample_id": f"{number:03}",
                "uri": f"/images/{number:03}.png",
                "etag": content,
                "content_id": content.encode().ljust(16),
                "label": 0,
                "split": split.value,
                "weight": 1.0,
            }
            for number, (content, split) in enumerate(rows)
        ],
        schema=MANIFEST_SCHEMA,
    )
    return write_samples(LocalStore(str(folder)), samples, CLASSES, key=f"{name}.parquet", fingerprint=name)


def test_a_dataset_without_a_test_split_is_refused_though_it_has_val_rows(tmp_path: Path) -> None:
    manifest = version(tmp_path, "first", ("a", TRAIN), ("b", VAL))
    with pytest.raises(DataError, match="test_fraction"):
        open_rows(manifest, None, RetrainFolder(LocalStore(str(tmp_path)), "pets"))


def test_an_image_that_training_sees_too_is_none_of_the_newest_rows(tmp_path: Path) -> None:
    before = (("a", TRAIN), ("b", VAL), ("c", TEST))
    first = version(tmp_path, "first", *before)
    folder = RetrainFolder(LocalStore(str(tmp_path)), "pets")
    open_rows(first, None, folder)
    twice = (("d", TRAIN), ("d", TEST), ("e", VAL), ("e", TEST), ("f", TEST))
    rows = open_rows(version(tmp_path, "second", *before, *twice), first, folder)
    assert [one.rstrip() for one in rows.newest.content_ids_N.tolist()] == [b"f"]
