"""A job's source and name: refreshed where they are the same dataset, and never another in its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from convoy.core.errors import ConfigError
from convoy.core.progress import Silent
from convoy.core.records import Split
from convoy.core.splits import SplitOptions
from convoy.pipelines.dataset import DatasetConfig, freeze
from convoy.pipelines.dataset_choice import DatasetChoice
from convoy.storage.datasets import open_dataset
from convoy.storage.local_store import LocalStore
from convoy.storage.manifests import Manifest
from convoy.storage.runs import OpenRun
from made_sources import write_files


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    """A workspace with a dataset that has half of its images in `val`."""
    write_files(tmp_path / "photos", *(f"{name}/{index}.jpg" for name in "ab" for index in range(50)))
    write_files(tmp_path / "new", "1.jpg")
    store = LocalStore(str(tmp_path / "workspace"))
    freeze(
        DatasetConfig(
            workspace=store.root_uri,
            name="photos",
            source=str(tmp_path / "photos"),
            splits=SplitOptions(val_fraction=0.5, test_fraction=0),
        )
    )
    return store


def open_for_a_job(store: LocalStore, source: str, **settings: Any) -> tuple[Manifest, list[str]]:
    folder = Path(store.root).parent / source
    choice = DatasetChoice(workspace=store.root_uri, name="photos", source=str(folder), **settings)
    return choice.open_for(store, OpenRun(store, verb="score", target="photos"), progress=Silent())


def test_a_job_refreshes_a_dataset_with_the_splits_that_it_has(store: LocalStore) -> None:
    before = open_dataset(store, "photos")
    assert open_for_a_job(store, "photos") == (before, [])
    write_files(Path(store.root).parent / "photos", *(f"a/{index}.jpg" for index in range(50, 100)))
    manifest, notes = open_for_a_job(store, "photos", split_options=SplitOptions(val_fraction=0.5))
    assert (manifest.num_samples, notes) == (150, [])
    assert Split.TEST not in manifest.counts
    ids = {
        split: set(before.read_table(["sample_id"], splits=[split])["sample_id"].to_pylist())
        for split in Split
    }
    assert ids[Split.VAL] <= set(
        manifest.read_table(["sample_id"], splits=[Split.VAL])["sample_id"].to_pylist()
    )


@pytest.mark.parametrize(
    ("source", "settings", "what"),
    [
        ("new", {}, "source: was"),
        ("photos", {"split_options": SplitOptions(seed=1)}, "splits.seed: was 0, is 1"),
        ("photos", {"reading": {"labels": "none"}}, "reading.labels: was 'folders', is 'none'"),
    ],
)
def test_a_job_replaces_no_dataset_that_was_made_otherwise(
    store: LocalStore, source: str, settings: dict[str, Any], what: str
) -> None:
    before = open_dataset(store, "photos")
    with pytest.raises(ConfigError, match=what):
        open_for_a_job(store, source, **settings)
    assert open_dataset(store, "photos") == before
