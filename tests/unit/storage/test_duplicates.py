from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from convoy.core.fingerprints import digest_bytes
from convoy.storage.commits import feature_prefix, part_key, publish, write_record
from convoy.storage.datasets import freeze_dataset, open_dataset
from convoy.storage.duplicates import DuplicateReport, content_digests, find_duplicates
from convoy.storage.feature_cache import FeatureCache, content_id_array
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


def test_a_copy_without_a_label_contradicts_nobody(tmp_path: Path) -> None:
    (tmp_path / "one.jpg").write_bytes(b"one")
    (tmp_path / "copy.jpg").write_bytes(b"one")
    listed = tmp_path / "images.csv"
    listed.write_text("path,label,split\none.jpg,cat,train\ncopy.jpg,,test\n")
    store = LocalStore(str(tmp_path / "workspace"))
    freeze_dataset(store, "made", str(listed))
    report = read_and_commit(store, open_dataset(store, "made"))
    assert (report.groups, report.across_splits, report.label_conflicts) == (1, 1, 0)


def test_of_a_large_group_a_few_are_named_and_all_are_counted(tmp_path: Path) -> None:
    files = {f"train/cat/{index:03}.jpg": b"one" for index in range(40)}
    store, manifest = dataset(tmp_path, {**files, "train/cat/x.jpg": b"two", "test/dog/y.jpg": b"two"})
    report = read_and_commit(store, manifest)
    assert (report.groups, report.samples, report.across_splits, report.label_conflicts) == (2, 42, 2, 1)
    assert report.examples == [["test/dog/y.jpg", "train/cat/x.jpg"], sorted(files)[:10]]


def test_the_largest_of_groups_that_are_as_bad_come_first(tmp_path: Path) -> None:
    files = {
        f"test/cat/{group:02}-{index}.jpg": bytes([group]) for group in range(15) for index in range(group)
    }
    report = read_and_commit(*dataset(tmp_path, files))
    assert (report.groups, report.samples) == (13, len(files) - 1)
    first = [group[0] for group in report.examples]
    assert first == [f"test/cat/{group:02}-0.jpg" for group in range(14, 4, -1)]


def test_copies_without_labels_agree_on_them(tmp_path: Path) -> None:
    report = read_and_commit(*dataset(tmp_path, {"1.jpg": b"one", "2.jpg": b"one"}))
    assert (report.samples, report.across_splits, report.label_conflicts) == (2, 0, 0)


def test_distinct_files_are_no_duplicates(tmp_path: Path) -> None:
    store, manifest = dataset(tmp_path, {f"c{i % 2}/{i}.jpg": str(i).encode() for i in range(8)})
    assert read_and_commit(store, manifest).groups == 0


def test_those_among_some_samples_are_found_whatever_the_set_has_rows_for(tmp_path: Path) -> None:
    files = {f"train/cat/{index}.jpg": b"one" for index in range(4)}
    store, manifest = dataset(tmp_path, {**files, "test/cat/4.jpg": b"one", "train/dog/5.jpg": b"two"})
    assert read_and_commit(store, manifest).samples == 5
    rows = manifest.read_table()
    some = rows.filter(pc.is_in(rows["sample_id"], pa.array(["train/cat/1.jpg", "train/cat/3.jpg"])))
    report = find_duplicates(store, manifest, SET_ID, some)
    assert (report.groups, report.samples, report.across_splits) == (1, 2, 0)
    assert report.examples == [["train/cat/1.jpg", "train/cat/3.jpg"]]
    assert find_duplicates(store, manifest, SET_ID, some.slice(0, 1)).groups == 0


def dataset_with_checksums(tmp_path: Path, files: dict[str, bytes]) -> tuple[LocalStore, Manifest]:
    """Equal files have one content id, as on S3."""
    lines = ["path,label,split,md5"]
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        lines.append(f"{name},cat,train,{hashlib.md5(data, usedforsecurity=False).hexdigest()}")
    listed = tmp_path / "images.csv"
    listed.write_text("\n".join(lines))
    store = LocalStore(str(tmp_path / "workspace"))
    freeze_dataset(store, "made", str(listed))
    return store, open_dataset(store, "made")


def test_a_copy_outside_of_some_samples_is_not_among_them_though_it_has_the_content_id_of_one(
    tmp_path: Path,
) -> None:
    files = {f"{pair}-{copy}.jpg": bytes([pair]) for pair in range(4) for copy in range(2)}
    store, manifest = dataset_with_checksums(tmp_path, files)
    assert read_and_commit(store, manifest).groups == 4
    rows = manifest.read_table()
    some = rows.filter(pc.is_in(rows["sample_id"], pa.array(["0-0.jpg", "0-1.jpg", "1-0.jpg", "2-1.jpg"])))
    report = find_duplicates(store, manifest, SET_ID, some)
    assert (report.groups, report.samples) == (1, 2)
    assert report.examples == [["0-0.jpg", "0-1.jpg"]]


def test_digests_of_some_contents_are_those_alone(tmp_path: Path) -> None:
    store, manifest = dataset(tmp_path, {f"{index}.jpg": bytes([index]) for index in range(4)})
    read_and_commit(store, manifest)
    cache = FeatureCache(store)
    ids, digests = content_digests(cache, SET_ID)
    wanted = np.sort(content_id_array(manifest.read_table(["content_id"])["content_id"])[:2])
    some_ids, some_digests = content_digests(cache, SET_ID, wanted)
    assert some_ids.tolist() == wanted.tolist()
    assert some_digests.tolist() == digests[np.searchsorted(ids, wanted)].tolist()
    assert not len(content_digests(cache, SET_ID, np.array([b"of no set"], "S16"))[0])
