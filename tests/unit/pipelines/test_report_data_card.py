"""The data card: what was found among a sample of the images is not said of the dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from convoy.core.records import Split
from convoy.pipelines.report_data_card import read_data_card
from convoy.storage.commits import finish, publish, read_records
from convoy.storage.local_store import LocalStore
from convoy.storage.manifests import Manifest
from convoy.storage.runs import RunFolder
from made_advice_rows import frozen_rows
from made_runs import finish_slice, new_run


def cache_run(store: LocalStore, manifest: Manifest, run_id: str, num_rows: int, **identity: Any) -> None:
    """A finished cache run that read the first rows of a manifest."""
    names = manifest.read_table()["sample_id"].to_pylist()[:num_rows]
    fields = {"dataset": "parts", "dataset_fingerprint": manifest.fingerprint, "splits": "all"}
    record = new_run(store, names, run_id=run_id, slice_rows=num_rows, identity=fields | identity)
    finish_slice(store, record, "0-000000")
    folder = RunFolder(store, run_id)
    publish(folder, record, read_records(folder))
    finish(folder, {})


def test_duplicates_are_those_of_whole_splits_and_never_of_a_sample_of_the_rows(tmp_path: Path) -> None:
    manifest = frozen_rows(tmp_path, {Split.TRAIN: (4, 4), Split.TEST: (2, 2)}, ("good", "defect"))
    store = LocalStore(str(tmp_path))
    cache_run(store, manifest, "20260102-000000-00000000", 3, rows="digest of three rows")
    assert read_data_card(store, "parts", manifest).duplicates is None
    cache_run(store, manifest, "20260101-000000-00000000", 12)
    found = read_data_card(store, "parts", manifest).duplicates
    assert found is not None
    assert found.groups == 0
