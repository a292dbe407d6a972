"""Datasets: frozen, refreshed, compared, and opened again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from convoy.core.errors import ConditionalWriteUnsupported, ConfigError, DataError, PreconditionFailed
from convoy.core.records import Split
from convoy.core.splits import SplitOptions
from convoy.storage.datasets import (
    DatasetVersion,
    freeze_dataset,
    list_datasets,
    notes_of_version,
    open_dataset,
    refuse_made_otherwise,
)
from convoy.storage.local_store import LocalStore
from convoy.storage.manifests import MANIFEST_SCHEMA, ManifestHeader, write_manifest
from convoy.storage.sources.completion import complete_rows, find_problems, order_classes
from convoy.storage.sources.rows import ReadingOptions, SourceRow, SourceScan, tabulate
from made_sources import jpeg_bytes, shard_bytes, tar_bytes, write_files

WHOLE = SplitOptions(val_fraction=0, test_fraction=0)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_files(
        tmp_path / "source", *(f"{name}/{index}.jpg" for name in ("cat", "dog") for index in range(5))
    )
    return tmp_path / "source"


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path / "workspace"))


def freeze(store: LocalStore, source: Path) -> DatasetVersion:
    return freeze_dataset(store, "pets", str(source), splits=WHOLE)


def files_of(store: LocalStore) -> dict[str, str]:
    return {info.key: info.etag for info in store.list_objects()}


def test_a_frozen_dataset_is_opened_by_name_and_by_fingerprint(store: LocalStore, source: Path) -> None:
    version = freeze(store, source)
    manifest = open_dataset(store, "pets")
    assert manifest == open_dataset(store, "pets", version.header.fingerprint)
    assert manifest.classes == ("cat", "dog")
    assert manifest.counts[Split.TRAIN].by_class == (5, 5)
    assert version.changes.added == manifest.num_samples == 10
    assert manifest.read_table(["sample_id"])["sample_id"][0].as_py() == "cat/0.jpg"
    summary = json.loads(store.get(f"datasets/pets/versions/{version.header.fingerprint}/summary.json").data)
    assert summary["header"]["num_samples"] == 10


def test_the_same_content_makes_no_new_version_and_writes_nothing(store: LocalStore, source: Path) -> None:
    first = freeze(store, source)
    before = files_of(store)
    again = freeze(store, source)
    assert again.header.fingerprint == first.header.fingerprint
    assert (again.changes.added, again.changes.changed, again.changes.removed) == (0, 0, 0)
    assert files_of(store) == before


def test_a_refresh_tells_what_was_added_changed_and_removed(store: LocalStore, source: Path) -> None:
    first = freeze(store, source)
    write_files(source, "eel/1.jpg", "eel/2.jpg")
    (source / "cat/0.jpg").write_bytes(jpeg_bytes(99) + b"other")
    os.remove(source / "dog/4.jpg")
    second = freeze(store, source)
    assert second.changes.model_dump() == {
        "added": 2,
        "changed": 1,
        "removed": 1,
        "moved": 0,
        "left_train": 0,
        "examples": {
            "added": ("eel/1.jpg", "eel/2.jpg"),
            "changed": ("cat/0.jpg",),
            "removed": ("dog/4.jpg",),
        },
    }
    assert open_dataset(store, "pets").fingerprint == second.header.fingerprint
    assert open_dataset(store, "pets", first.header.fingerprint).num_samples == 10


def test_a_changed_label_is_a_change(store: LocalStore, source: Path) -> None:
    lists = source / "list.csv"
    lists.write_text("path,label\ncat/0.jpg,cat\ndog/0.jpg,dog\n")
    freeze(store, lists)
    lists.write_text("path,label\ncat/0.jpg,cow\ndog/0.jpg,dog\n")
    changes = freeze(store, lists).changes
    assert (changes.added, changes.changed, changes.examples) == (0, 1, {"changed": ("cat/0.jpg",)})


def test_a_refresh_that_takes_samples_out_of_train_warns_with_their_number(
    store: LocalStore, source: Path
) -> None:
    lists = source / "list.csv"
    rows = {"cat/0.jpg": "train", "cat/1.jpg": "train", "dog/0.jpg": "test", "dog/1.jpg": "train"}

    def frozen() -> DatasetVersion:
        lists.write_text("path,split\n" + "".join(f"{path},{split}\n" for path, split in rows.items()))
        return freeze(store, lists)

    assert not any("left the split train" in warning for warning in frozen().warnings)
    rows |= {"cat/0.jpg": "test", "cat/1.jpg": "val", "dog/0.jpg": "val"}
    second = frozen()
    assert (second.changes.changed, second.changes.left_train) == (3, 2)
    assert any(warning.startswith("2 samples left the split train") for warning in second.warnings)


def test_the_same_content_elsewhere_moves_the_samples_of_the_same_version(
    store: LocalStore, source: Path
) -> None:
    def write_list(root: Path) -> Path:
        digits = sha256((root / "cat/0.jpg").read_bytes()).hexdigest()
        (root / "list.csv").write_text(f"path,sha256\ncat/0.jpg,{digits}\n")
        return root / "list.csv"

    first = freeze(store, write_list(source))
    moved = shutil.move(source, source.with_name("moved"))
    second = freeze(store, write_list(Path(moved)))
    assert second.header.fingerprint == first.header.fingerprint
    assert (second.changes.moved, second.changes.changed) == (1, 0)
    assert open_dataset(store, "pets").read_table()["uri"].to_pylist() == [f"{moved}/cat/0.jpg"]


def test_unchanged_shards_are_not_read_again(store: LocalStore, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    for index in range(3):
        (shards / f"{index}.tar").write_bytes(shard_bytes({f"{index}{row}": "cat" for row in range(3)}))
    first = freeze(store, shards)
    # The bytes are spoilt behind the back of etag: only a shard that is not read can give its rows.
    _spoil_but_keep_etag(shards / "0.tar")
    (shards / "2.tar").write_bytes(shard_bytes({"20": "cat", "21": "dog"}))
    second = freeze(store, shards)
    assert (second.changes.added, second.changes.changed, second.changes.removed) == (0, 2, 1)
    assert first.header.num_samples == 9
    rows = open_dataset(store, "pets").read_table().to_pylist()
    assert [row["sample_id"] for row in rows if row["uri"].endswith("0.tar")] == [
        "0.tar#00",
        "0.tar#01",
        "0.tar#02",
    ]
    assert open_dataset(store, "pets").classes == ("cat", "dog")


def test_unchanged_parquet_files_are_not_read_again(store: LocalStore, tmp_path: Path) -> None:
    for name in ("train-0", "train-1"):
        os.makedirs(tmp_path / "parquets", exist_ok=True)
        table = pa.table({"image": [jpeg_bytes(0), jpeg_bytes(1)], "label": ["cat", "dog"]})
        pq.write_table(table, tmp_path / f"parquets/{name}.parquet")
    first = freeze(store, tmp_path / "parquets")
    _spoil_but_keep_etag(tmp_path / "parquets/train-1.parquet")
    assert freeze(store, tmp_path / "parquets").header.fingerprint == first.header.fingerprint


def test_a_cut_shard_is_read_and_told_again(store: LocalStore, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/0.tar").write_bytes(shard_bytes({"0": "cat", "1": "cat"})[:4000])
    assert "0.tar is cut off" in freeze(store, tmp_path / "shards").warnings[0]
    assert "0.tar is cut off" in freeze(store, tmp_path / "shards").warnings[0]


def test_a_refresh_remembers_what_shards_that_it_does_not_read_left_out(
    store: LocalStore, tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "0.tar").write_bytes(tar_bytes({"0.jpg": jpeg_bytes(0), "1.cls": b"cat", "2.txt": b"cat"}))
    assert freeze(store, shards).skipped == {"no_image": 2}
    assert freeze(store, shards).skipped == {"no_image": 2}
    (shards / "1.tar").write_bytes(tar_bytes({"0.jpg": jpeg_bytes(1), "1.cls": b"cat"}))
    for _ in range(2):
        version = freeze(store, shards)
        assert version.skipped == {"no_image": 3}
        assert "without an image were left out: 3 (0.tar" in version.warnings[0]
    key = f"datasets/pets/versions/{version.header.fingerprint}/summary.json"
    assert json.loads(store.get(key).data)["skipped"] == {"no_image": 3}
    (shards / "0.tar").unlink()
    assert freeze(store, shards).skipped == {"no_image": 1}


def test_a_refresh_with_other_reading_options_reads_all(store: LocalStore, tmp_path: Path) -> None:
    table = pa.table({"image": [jpeg_bytes(0)], "label": ["cat"], "breed": ["manx"]})
    pq.write_table(table, tmp_path / "a.parquet")
    freeze(store, tmp_path / "a.parquet")
    freeze_dataset(store, "pets", str(tmp_path / "a.parquet"), reading=ReadingOptions(label_column="breed"))
    assert open_dataset(store, "pets").classes == ("manx",)


def splits_of(store: LocalStore) -> dict[str, str]:
    rows = open_dataset(store, "pets").read_table(["sample_id", "split"])
    return dict(zip(*rows.to_pydict().values(), strict=True))


def test_a_dataset_keeps_how_it_was_split_where_a_refresh_does_not_tell(
    store: LocalStore, source: Path
) -> None:
    write_files(source, *(f"cat/{index}.jpg" for index in range(10, 100)))
    freeze_dataset(
        store, "pets", str(source), splits=SplitOptions(seed=7, val_fraction=0.2, test_fraction=0.3)
    )
    before = splits_of(store)
    assert len(set(before.values())) == 3
    for told in (None, SplitOptions(), SplitOptions(seed=7)):
        again = freeze_dataset(store, "pets", str(source), splits=told)
        assert (again.changes.changed, again.made_otherwise) == (0, ())
    other = freeze_dataset(store, "pets", str(source), splits=SplitOptions(seed=8))
    assert other.header.splits == SplitOptions(seed=8, val_fraction=0.2, test_fraction=0.3)
    assert other.changes.changed > 0
    assert "splits.seed: was 7, is 8" in other.warnings[0]
    with pytest.raises(ConfigError, match="less than 1"):
        freeze_dataset(store, "pets", str(source), splits=SplitOptions(val_fraction=0.8))


def test_what_made_a_dataset_otherwise_is_told_or_refused_before_anything_is_written(
    store: LocalStore, source: Path
) -> None:
    freeze(store, source)
    before = files_of(store)
    with pytest.raises(ConfigError, match=rf"source: was '{source}', is '{source}/cat'"):
        freeze_dataset(store, "pets", str(source / "cat"), check=refuse_made_otherwise)
    unlabelled = ReadingOptions(labels="none")
    with pytest.raises(ConfigError, match="labels: was 'folders', is 'none'") as refused:
        freeze_dataset(store, "pets", str(source), reading=unlabelled, check=refuse_made_otherwise)
    assert "another name" in str(refused.value.next_step)
    assert files_of(store) == before
    replaced = freeze_dataset(store, "pets", str(source), reading=unlabelled)
    assert "reading.labels: was 'folders', is 'none'" in replaced.warnings[0]


def test_a_layout_that_is_named_as_it_was_found_or_a_link_to_the_source_makes_nothing_otherwise(
    store: LocalStore, source: Path, tmp_path: Path
) -> None:
    freeze(store, source)
    (tmp_path / "link").symlink_to(source)
    named = ReadingOptions(kind="folders")
    for place, reading in ((source, named), (source, None), (tmp_path / "link", named)):
        again = freeze_dataset(store, "pets", str(place), reading=reading, check=refuse_made_otherwise)
        assert again.made_otherwise == ()


def test_a_version_that_does_not_say_how_it_was_split_is_split_as_the_refresh_tells(
    store: LocalStore, source: Path
) -> None:
    freeze(store, source)
    manifest = open_dataset(store, "pets")
    header = manifest.header.model_dump(exclude={"splits"})
    header["reading"].pop("label_column")
    write_manifest(store, manifest.key, manifest.read_table(), ManifestHeader.model_validate(header))
    told = SplitOptions(val_fraction=0, test_fraction=0.9)
    again = freeze_dataset(store, "pets", str(source), splits=told, check=refuse_made_otherwise)
    assert again.header.splits == told
    assert Split.TEST in open_dataset(store, "pets").counts


@pytest.mark.parametrize("kind", [None, "images"])
def test_a_workspace_inside_the_source_is_no_part_of_it(source: Path, kind: str | None) -> None:
    store = LocalStore(str(source / "workspace"))
    reading = ReadingOptions(kind=kind)
    versions = [freeze_dataset(store, "pets", str(source), reading=reading) for _ in range(2)]
    assert versions[1].header == versions[0].header
    assert versions[1].header.num_samples == 10
    assert versions[1].header.classes == (() if kind else ("cat", "dog"))
    assert versions[1].warnings[0] == "the workspace lies in the source, and was left out: workspace/"


def test_tars_beside_the_workspace_are_found_however_much_it_holds(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path / "a/workspace"))
    for index in range(1001):
        store.put(f"features/{index}.parquet", b"")
    (tmp_path / "b.tar").write_bytes(shard_bytes({"0": "cat"}))
    version = freeze(store, tmp_path)
    assert (version.kind, version.header.num_samples, version.skipped) == ("tars", 1, {})


def test_the_workspace_is_recognised_through_a_link_and_is_no_source_itself(
    tmp_path: Path, source: Path
) -> None:
    (tmp_path / "link").symlink_to(source)
    store = LocalStore(str(source / "workspace"))
    freeze(store, source)
    assert freeze(store, tmp_path / "link").header.classes == ("cat", "dog")
    with pytest.raises(ConfigError, match="the workspace itself"):
        freeze(LocalStore(str(source)), tmp_path / "link")


@pytest.mark.parametrize("suffix", ["tar", "parquet"])
def test_shards_that_were_read_otherwise_with_the_same_result_are_read_once(
    store: LocalStore, tmp_path: Path, suffix: str
) -> None:
    shard = tmp_path / f"0.{suffix}"
    if suffix == "tar":
        shard.write_bytes(shard_bytes({"0": "cat"}))
    else:
        pq.write_table(pa.table({"image": [jpeg_bytes(0)], "label": ["cat"]}), shard)
    kind = ReadingOptions(kind="tars" if suffix == "tar" else "parquet")
    first = freeze(store, shard)
    again = freeze_dataset(store, "pets", str(shard), reading=kind)
    assert again.header.fingerprint == first.header.fingerprint
    assert open_dataset(store, "pets").header == again.header != first.header
    if suffix == "tar":
        _spoil_but_keep_etag(shard)
    assert freeze_dataset(store, "pets", str(shard), reading=kind).header == again.header


def test_what_a_refresh_left_out_is_kept_where_no_sample_changed(store: LocalStore, source: Path) -> None:
    version = freeze(store, source)
    write_files(source, "stray.jpg")
    assert freeze(store, source).header == version.header
    notes = notes_of_version(store, "pets", version.header.fingerprint)
    assert "1 objects skipped as no_class" in notes


def test_what_a_freeze_warned_of_is_known_of_its_version_after_another_that_changed_nothing(
    store: LocalStore, source: Path
) -> None:
    freeze(store, source)
    replaced = freeze_dataset(store, "pets", str(source), reading=ReadingOptions(labels="none"))
    warning = next(one for one in replaced.warnings if "made otherwise" in one)
    again = freeze_dataset(store, "pets", str(source), reading=ReadingOptions(labels="none"))
    assert warning not in again.warnings
    assert warning in notes_of_version(store, "pets", replaced.header.fingerprint)


def test_names_of_datasets_are_told_when_one_is_missing(store: LocalStore, source: Path) -> None:
    freeze(store, source)
    assert list_datasets(store) == ["pets"]
    with pytest.raises(DataError, match="only: pets"):
        open_dataset(store, "birds")
    with pytest.raises(DataError, match=open_dataset(store, "pets").fingerprint):
        open_dataset(store, "pets", "0" * 32)
    with pytest.raises(ConfigError, match="cannot name"):
        open_dataset(store, "../pets")


def test_a_source_without_samples_is_an_error(store: LocalStore, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/README.md").write_text("nothing here")
    with pytest.raises(DataError, match="no sample") as caught:
        freeze(store, tmp_path / "empty")
    assert "side_file" in str(caught.value)
    assert files_of(store) == {}


class _StoreWithoutIfMatch(LocalStore):
    def put_if_match(self, key: str, data: bytes, *, etag: str) -> str:
        raise ConditionalWriteUnsupported("no If-Match", where=key)


def test_without_conditional_writes_the_pointer_still_moves_with_a_warning(
    tmp_path: Path, source: Path
) -> None:
    store = _StoreWithoutIfMatch(str(tmp_path / "workspace"))
    freeze(store, source)
    write_files(source, "cat/new.jpg")
    assert "two refreshes" in freeze(store, source).warnings[-1]
    assert open_dataset(store, "pets").num_samples == 11


class _RivalStore(LocalStore):
    """Lets another process move the pointer just before this one does."""

    def put_if_match(self, key: str, data: bytes, *, etag: str) -> str:
        self.put(key, b'{"fingerprint": "of a rival"}')
        return LocalStore.put_if_match(self, key, data, etag=etag)


def test_a_rival_refresh_is_not_overwritten(tmp_path: Path, source: Path) -> None:
    store = _RivalStore(str(tmp_path / "workspace"))
    freeze(store, source)
    write_files(source, "cat/new.jpg")
    with pytest.raises(PreconditionFailed, match="another process"):
        freeze(store, source)
    assert json.loads(store.get("datasets/pets/current.json").data) == {"fingerprint": "of a rival"}


def scan_of(*rows: tuple[str, str | None, str | None], classes: tuple[str, ...] | None = None) -> SourceScan:
    made = (
        SourceRow(
            sample_id=sample_id,
            uri=sample_id,
            etag="e",
            size_bytes=1,
            content_id=sample_id.partition("@")[0].encode().rjust(16),
            label=label,
            split=split,
        )
        for sample_id, label, split in rows
    )
    return SourceScan(samples=tabulate(made), classes=classes)


def problems_of(scan: SourceScan) -> list[str]:
    return list(find_problems(*complete_rows(scan, WHOLE)))


def test_a_single_class_is_told() -> None:
    (problem,) = problems_of(scan_of(("a", "data", None), ("b", "data", None)))
    assert "only one class, 'data'" in problem
    assert problems_of(scan_of(("a", None, "test"))) == []


def test_class_names_that_differ_only_in_spaces_or_case_are_told() -> None:
    names = ("Cat", "cat", "sea lion", "sealion", "dog")
    rows = [(f"{name} {number}", name, None) for name in names for number in range(2)]
    (problem,) = problems_of(scan_of(*rows))
    assert "spaces or case: 2 ('Cat' and 'cat', 'sea lion' and 'sealion')" in problem


def test_classes_are_sorted_as_integers_or_by_their_bytes() -> None:
    assert order_classes(["10", "9", "01"]) == ["01", "9", "10"]
    assert order_classes(["10", "9", "a"]) == ["10", "9", "a"]
    assert order_classes(["ä", "Z", "a"]) == ["Z", "a", "ä"]


def test_declared_classes_keep_their_order() -> None:
    samples, classes = complete_rows(scan_of(("a", "wolf", None), classes=("wolf", "ant")), WHOLE)
    assert (classes, samples["label"].to_pylist()) == (("wolf", "ant"), [0])
    assert samples.schema.equals(MANIFEST_SCHEMA)


def test_val_comes_out_of_train_and_test_stays_whole() -> None:
    rows = [(f"{split}/{index}", "cat", split) for split in ("train", "test") for index in range(500)]
    samples, _ = complete_rows(scan_of(*rows), SplitOptions())
    splits = dict(zip(samples["sample_id"].to_pylist(), samples["split"].to_pylist(), strict=True))
    assert {splits[f"test/{index}"] for index in range(500)} == {"test"}
    assert {splits[f"train/{index}"] for index in range(500)} == {"train", "val"}


def test_new_samples_move_no_old_one() -> None:
    def drawn(count: int) -> Iterable[tuple[str, str]]:
        rows = [(f"{index}", "cat", None) for index in range(count)]
        samples, _ = complete_rows(scan_of(*rows), SplitOptions())
        return zip(samples["sample_id"].to_pylist(), samples["split"].to_pylist(), strict=True)

    assert set(drawn(300)) <= set(drawn(600))


def test_a_source_without_labels_and_splits_is_all_test() -> None:
    samples, classes = complete_rows(scan_of(("a", None, None), ("b", None, None)), SplitOptions())
    assert (classes, samples["split"].to_pylist()) == ((), ["test", "test"])


def test_a_split_is_labelled_wholly_or_not_at_all() -> None:
    whole_test_split = scan_of(("a", "cat", "train"), ("b", "cat", "train"), ("c", None, "test"))
    assert "1 samples of test have no label" in problems_of(whole_test_split)
    with pytest.raises(DataError, match=r"1 \(b\); 1 others of train"):
        complete_rows(scan_of(("a", "cat", "train"), ("b", None, "train")), WHOLE)


def test_thin_classes_are_told_with_counts() -> None:
    rows = [
        ("a", "cat", "train"),
        ("b", "cat", "train"),
        ("c", "cat", "test"),
        ("d", "dog", "test"),
        ("e", "eel", "train"),
    ]
    assert problems_of(scan_of(*rows, classes=("cat", "dog", "eel", "fox"))) == [
        "classes without any sample: 1 (fox) of 4",
        "classes with a single sample: 2 (dog, eel) of 4",
        "classes missing in train: 1 (dog) of 4",
        "classes missing in test: 1 (eel) of 4",
    ]


def test_equal_content_under_two_labels_or_in_two_splits_is_told() -> None:
    rows = [("a@1", "cat", "train"), ("a@2", "dog", "train"), ("b@1", "cat", "train"), ("b@2", "cat", "test")]
    problems = [text for text in problems_of(scan_of(*rows)) if "several times" in text]
    assert problems == [
        "1 images occur several times under different labels, such as a@1, a@2",
        "1 images occur several times under several splits, such as b@1, b@2",
    ]


def _spoil_but_keep_etag(path: Path) -> None:
    status = path.stat()
    path.write_bytes(b"\0" * status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
