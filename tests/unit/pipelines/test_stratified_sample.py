from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from convoy.core.errors import DataError
from convoy.core.records import Split
from convoy.core.splits import SplitOptions
from convoy.pipelines import stratified_sample
from convoy.pipelines.stratified_sample import (
    evenly_spread_rows,
    labels_of,
    rows_by_sample_id,
    stratified_rows,
)
from convoy.storage.datasets import freeze_dataset, open_dataset
from convoy.storage.local_store import LocalStore
from convoy.storage.manifests import ROWS_PER_GROUP, Manifest
from made_advice_rows import frozen_rows


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """Many cats, a few dogs, one bird, and three images of the split `val`."""
    for folder, number in (("train/cat", 30), ("train/dog", 4), ("train/bird", 1), ("val/cat", 3)):
        path = tmp_path / "images" / folder
        path.mkdir(parents=True)
        for index in range(number):
            (path / f"{index:02}.png").write_bytes(f"{folder} {index}".encode())
    store = LocalStore(str(tmp_path / "workspace"))
    freeze_dataset(
        store, "pets", str(tmp_path / "images"), splits=SplitOptions(val_fraction=0, test_fraction=0)
    )
    return open_dataset(store, "pets")


def test_every_class_has_a_place_before_any_has_two(manifest: Manifest) -> None:
    rows = stratified_rows(manifest, 12, splits=[Split.TRAIN])
    names = [manifest.classes[label] for label in labels_of(rows)]
    assert set(names[:3]) == {"cat", "dog", "bird"}
    assert Counter(names) == {"cat": 7, "dog": 4, "bird": 1}
    assert set(rows["split"].to_pylist()) == {"train"}


def test_a_larger_sample_only_adds_rows_and_another_seed_draws_others(manifest: Manifest) -> None:
    def drawn(number: int, seed: int = 0) -> list[str]:
        ids: list[str] = stratified_rows(manifest, number, splits=[Split.TRAIN], seed=seed)[
            "sample_id"
        ].to_pylist()
        return ids

    assert drawn(12) == drawn(12) == drawn(20)[:12]
    assert set(drawn(12, seed=1)) != set(drawn(12))
    assert len(drawn(100)) == 35


def test_of_many_classes_no_more_rows_are_held_than_the_sample_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = frozen_rows(tmp_path, {Split.TRAIN: (5000,) * 8}, tuple("abcdefgh"))
    place_in_class, held = stratified_sample._place_in_class, []

    def counted(rows: pa.Table, draws_N: np.ndarray) -> np.ndarray:
        held.append(rows.num_rows)
        return place_in_class(rows, draws_N)

    monkeypatch.setattr(stratified_sample, "_place_in_class", counted)
    rows = stratified_rows(manifest, 2000, splits=[Split.TRAIN])
    assert max(held) <= 2000 + ROWS_PER_GROUP
    assert Counter(labels_of(rows).tolist()) == dict.fromkeys(range(8), 250)


def test_several_splits_are_one_pool(manifest: Manifest) -> None:
    assert stratified_rows(manifest, 100, splits=[Split.TRAIN, Split.VAL]).num_rows == 38


def test_a_split_without_samples_is_refused(manifest: Manifest) -> None:
    with pytest.raises(DataError, match="no sample in split test"):
        stratified_rows(manifest, 5, splits=[Split.TEST])


@pytest.mark.parametrize("most", [1, 7, 300, 40_000, 50_000])
def test_rows_from_all_over_a_manifest_are_read_batch_by_batch(tmp_path: Path, most: int) -> None:
    manifest = frozen_rows(tmp_path, {Split.TRAIN: (30_000,), Split.VAL: (10_000,)}, ("a",))
    wanted_N = np.linspace(0, 39_999, min(most, 40_000)).round().astype(np.int64)
    assert evenly_spread_rows(manifest, most) == manifest.read_table().take(pa.array(wanted_N))


def test_rows_from_all_over_one_split(manifest: Manifest) -> None:
    rows = manifest.read_table(splits=[Split.VAL])
    found = evenly_spread_rows(manifest, 3, splits=[Split.VAL])
    assert found == rows.take(pa.array([0, round((rows.num_rows - 1) / 2), rows.num_rows - 1]))


def test_samples_are_found_by_name(manifest: Manifest) -> None:
    rows = rows_by_sample_id(manifest, ["val/cat/01.png", "train/bird/00.png"])
    assert rows["sample_id"].to_pylist() == ["train/bird/00.png", "val/cat/01.png"]
    with pytest.raises(DataError, match=r"no sample 'train/bird/09\.png'"):
        rows_by_sample_id(manifest, ["train/bird/09.png"])
