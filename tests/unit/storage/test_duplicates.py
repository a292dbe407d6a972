from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from convoy.core.fingerprints import digest_bytes
from convoy.storage.commits import feature_prefix, part_key, publish, write_record
from convoy.storage.datasets import freeze_dataset, open_dataset
from convoy.storage.duplicates import DuplicateReport, find_duplicates
from convoy.storage.local_store import LocalStore
from convoy.storage.manifests import Manifest
from convoy.storage.parts import FeatureRows, write_features
from convoy.storage.runs import RunFolder
from made_runs import SET_ID, finish_slice, new_run


def read_and_commit(store: LocalStore, manifest: Manifest) -> DuplicateReport:
    """What a cache run leaves of the samples' bytes: their digests, in one committed part."""
    samples = pa.concat_tables([pa.table(batch) for batch in manifest.iter_batches()])
    run = new_run(store, ["stand-in"], slice_rows=1)
    record = finish_slice(store, run, "0-000000")
    rows = FeatureRows(
        sample_ids=samples["sample_id"].to_pylist(),
        content_ids=samples["content_id"].to_pylist(),
        content_digests=[digest_bytes(Path(uri).read_bytes()) for uri in samples["uri"].to_pylist()],
        view=0,
        features_BD=np.zeros((samples.num_rows, 2), np.float32),
    )
    part = write_features(store, part_key(feature_prefix(SET_ID, run.run_id), "0-000000", "b"), rows, {})
    record = record.model_copy(update={"parts": {SET_ID: part}, "attempt": "b"})
    write_record(store, record)
    publish(RunFolder(store, run.run_id), run, [record])
    return find_duplicates(store, manifest, SET_ID)


def dataset(tmp_path: Path, files: dict[str, bytes]) -> tuple[LocalStore, Manifest]:
    for name, data in files.items():
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    store = LocalStore(str(tmp_path / "workspace"))
    freeze_dataset(store, "made", str(tmp_path / "images"))
    return store, open_dataset(store, "made")


def test_leaks_and_label_conflicts_are_counted_and_named(tmp_path: Path) -> None:
    store, manifest = dataset(
        tmp_path,
        {
            "train/cat/1.jpg": b"one",
            "train/cat/2.jpg": b"two",
            "train/dog/3.jpg": b"two",
            "test/cat/4.jpg": b"one",
            "test/dog/5.jpg": b"five",
        },
    )
    report = read_and_commit(store, manifest)
    assert (report.groups, report.samples, report.label_conflicts) == (2, 4, 1)
    assert report.examples[0] == ["train/cat/2.jpg", "train/dog/3.jpg"]
    assert report.across_splits >= 1


def test_distinct_files_are_no_duplicates(tmp_path: Path) -> None:
    store, manifest = dataset(tmp_path, {f"c{i % 2}/{i}.jpg": str(i).encode() for i in range(8)})
    assert read_and_commit(store, manifest).groups == 0
