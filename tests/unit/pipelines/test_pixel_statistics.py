from __future__ import annotations

from pathlib import Path

import pytest

from convoy.core.progress import Silent
from convoy.core.records import Split
from convoy.core.splits import SplitOptions
from convoy.pipelines.pixel_statistics import choose_rows, known_augmentation, resolve_augmentation
from convoy.storage.datasets import freeze_dataset, open_dataset
from convoy.storage.local_store import LocalStore
from convoy.storage.manifests import Manifest
from convoy.vision.augmentation_policy import AugmentationPolicy, PcaBasis, PcaColour
from convoy.vision.decode_rule import DecodeRule
from made_sources import write_files

PCA = AugmentationPolicy(pca_colour=PcaColour())
BASIS = PcaBasis(eigenvalues=(0.1, 0.01, 0.001), eigenvectors=((1, 0, 0), (0, 1, 0), (0, 0, 1)))


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path / "workspace"))


@pytest.fixture
def manifest(store: LocalStore, tmp_path: Path) -> Manifest:
    write_files(tmp_path / "source", *(f"all/{index}.jpg" for index in range(200)))
    splits = SplitOptions(val_fraction=0.2, test_fraction=0.1)
    freeze_dataset(store, "pets", str(tmp_path / "source"), splits=splits)
    return open_dataset(store, "pets")


def test_chosen_rows_are_of_the_train_split_in_order_and_grow_with_their_number(manifest: Manifest) -> None:
    few, more = (choose_rows(manifest, number)["sample_id"].to_pylist() for number in (20, 60))
    train = manifest.read_table(["sample_id"], splits=[Split.TRAIN])["sample_id"].to_pylist()
    assert (len(few), len(more)) == (20, 60)
    assert set(few) < set(more) < set(train)
    assert few == sorted(few)
    assert few != train[:20]
    assert choose_rows(manifest, 1000)["sample_id"].to_pylist() == train


@pytest.mark.parametrize(
    "policy",
    [AugmentationPolicy(), PCA.with_basis(BASIS), AugmentationPolicy(pca_colour=PcaColour(strength=0))],
)
def test_policy_that_lacks_nothing_comes_back_as_it_is(
    store: LocalStore, manifest: Manifest, policy: AugmentationPolicy
) -> None:
    written = len(list(store.list_objects()))
    assert resolve_augmentation(store, manifest, "pets", policy, DecodeRule(), Silent()) is policy
    assert known_augmentation(store, manifest, "pets", policy, DecodeRule()) is policy
    assert len(list(store.list_objects())) == written


def test_colours_that_nobody_measured_are_not_known(store: LocalStore, manifest: Manifest) -> None:
    assert known_augmentation(store, manifest, "pets", PCA, DecodeRule()) is None
