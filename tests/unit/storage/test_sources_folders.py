"""Class folders as a source, and how a source's kind is found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from convoy.core.errors import ConfigError, DataError
from convoy.storage.local_store import LocalStore
from convoy.storage.object_store import ObjectInfo
from convoy.storage.s3_store import S3Store
from convoy.storage.sources.folders import read_folders
from convoy.storage.sources.listing import SourceRoot, map_listing
from convoy.storage.sources.reading import find_kind, read_source
from convoy.storage.sources.rows import LabelRule, ReadingOptions, SourceKind, SourceScan
from made_sources import jpeg_bytes, shard_bytes, write_files


def read(root: Path, kind: SourceKind | None = None) -> SourceScan:
    return read_source(str(root), ReadingOptions(kind=kind))[1]


def rows_of(scan: SourceScan) -> dict[str, tuple[str | None, str | None]]:
    rows = scan.samples.select(["sample_id", "label", "split"]).to_pylist()
    return {row["sample_id"]: (row["label"], row["split"]) for row in rows}


def test_folders_are_classes_and_folders_below_belong_to_them(tmp_path: Path) -> None:
    write_files(tmp_path, "cat/1.jpg", "cat/deep/er/2.jpg", "dog/1.jpg", "dog-2/1.jpg")
    assert rows_of(read(tmp_path)) == {
        "cat/1.jpg": ("cat", None),
        "cat/deep/er/2.jpg": ("cat", None),
        "dog/1.jpg": ("dog", None),
        "dog-2/1.jpg": ("dog-2", None),
    }


def test_more_folders_than_ranges_are_all_listed_once(tmp_path: Path) -> None:
    names = [f"{number:04}/1.jpg" for number in range(600)]
    write_files(tmp_path, *names)
    ranges = list(map_listing(SourceRoot.open(str(tmp_path)), lambda objects: [one.key for one in objects]))
    assert [key for keys in ranges for key in keys] == names
    assert 256 <= len(ranges) <= 512


def test_split_folders_on_top_name_the_split(tmp_path: Path) -> None:
    write_files(tmp_path, "train/cat/1.jpg", "valid/cat/1.jpg", "Validation/dog/2.jpg", "test/dog/1.jpg")
    assert rows_of(read(tmp_path)) == {
        "train/cat/1.jpg": ("cat", "train"),
        "valid/cat/1.jpg": ("cat", "val"),
        "Validation/dog/2.jpg": ("dog", "val"),
        "test/dog/1.jpg": ("dog", "test"),
    }


def test_without_labels_files_beside_split_folders_are_samples_too(tmp_path: Path) -> None:
    write_files(tmp_path, "beside.jpg", "train/1.jpg", "train/cat/1.jpg")
    assert rows_of(read(tmp_path, SourceKind.IMAGES)) == {
        "beside.jpg": (None, None),
        "train/1.jpg": (None, "train"),
        "train/cat/1.jpg": (None, "train"),
    }


def test_one_class_may_be_called_like_a_split(tmp_path: Path) -> None:
    write_files(tmp_path, "car/1.jpg", "train/1.jpg")
    scan = read(tmp_path)
    assert rows_of(scan)["train/1.jpg"] == ("train", None)
    assert "'train' was taken for a class" in scan.warnings[0]


def test_splits_beside_other_folders_are_ambiguous(tmp_path: Path) -> None:
    write_files(tmp_path, "train/cat/1.jpg", "test/cat/1.jpg", "notes/1.jpg")
    with pytest.raises(DataError, match="notes") as caught:
        read(tmp_path)
    assert "reading.labels=none" in caught.value.next_step
    scan = read(tmp_path, SourceKind.IMAGES)
    assert set(rows_of(scan).values()) == {(None, None)}
    assert len(rows_of(scan)) == 3
    assert all("taken for any folder" in warning for warning in scan.warnings)
    assert len(scan.warnings) == 2


@pytest.mark.parametrize(
    ("files", "advice"),
    [
        (
            ["data/train/cats/1.jpg", "data/test/dogs/1.jpg", "data/more/1.jpg"],
            "2 (data/test, data/train); did you mean the folder data inside of this source?",
        ),
        (
            ["cats/Train/1.jpg", "cats/test/1.jpg", "dogs/train/1.jpg", "dogs/1.jpg"],
            "3 (cats/Train, cats/test, dogs/train); put the splits on top, as SPLIT/CLASS/FILE",
        ),
    ],
)
def test_folders_inside_of_classes_that_are_named_like_splits_are_told(
    tmp_path: Path, files: list[str], advice: str
) -> None:
    write_files(tmp_path, *files)
    (warning,) = read(tmp_path).warnings
    assert advice in warning


@pytest.mark.parametrize("files", [["train/cats/test/1.jpg"], ["cats/old/1.jpg", "cats/test.jpg"]])
def test_other_folders_inside_of_classes_are_nothing_to_tell(tmp_path: Path, files: list[str]) -> None:
    write_files(tmp_path, *files)
    assert read(tmp_path).warnings == ()


def test_files_without_a_class_are_left_out_with_a_warning(tmp_path: Path) -> None:
    write_files(tmp_path, "stray.jpg", "cat/1.jpg", "metadata.csv")
    scan = read(tmp_path)
    assert list(rows_of(scan)) == ["cat/1.jpg"]
    assert scan.skipped == {"no_class": 2}
    assert "2 (metadata.csv, stray.jpg)" in scan.warnings[0]


def test_links_that_lead_nowhere_are_counted_with_a_warning(tmp_path: Path) -> None:
    write_files(tmp_path, "cat/1.jpg")
    (tmp_path / "cat/2.jpg").symlink_to("1.jpg")
    (tmp_path / "cat/3.jpg").symlink_to("nothing.jpg")
    (tmp_path / "cat/4.jpg").symlink_to("4.jpg")
    (tmp_path / "cat/.#1.jpg").symlink_to("somebody@somewhere")
    (tmp_path / "cat/circle").symlink_to(tmp_path)
    scan = read(tmp_path)
    assert list(rows_of(scan)) == ["cat/1.jpg", "cat/2.jpg"]
    assert scan.skipped == {"dangling_link": 2, "circular_link": 1}
    assert "2 (cat/3.jpg, cat/4.jpg)" in scan.warnings[-1]


def test_a_link_to_a_folder_that_holds_the_source_is_not_followed(tmp_path: Path) -> None:
    source = tmp_path / "mess"
    write_files(tmp_path, "mess/cat/1.jpg", "other/dog/2.jpg", "workspace/datasets/pets/3.jpg")
    (source / "loop").symlink_to("..")
    (source / "cat/self").symlink_to(source)
    (tmp_path / "named").symlink_to(source)
    (source / "owl").symlink_to(tmp_path / "other/dog")
    for root in (source, tmp_path / "named"):
        scan = read(root)
        assert list(rows_of(scan)) == ["cat/1.jpg", "owl/2.jpg"]
        assert scan.skipped == {"circular_link": 2}
        (warning,) = scan.warnings
        assert warning == "links that lead to a folder that they lie in were left out: 2 (cat/self, loop)"
    assert LocalStore(str(source)).list_folders() == ["cat", "owl"]


def test_a_flat_folder_is_unlabelled(tmp_path: Path) -> None:
    write_files(tmp_path, "1.jpg", "2.jpg")
    assert rows_of(read(tmp_path)) == {"1.jpg": (None, None), "2.jpg": (None, None)}


def test_kind_images_makes_any_folders_unlabelled(tmp_path: Path) -> None:
    write_files(tmp_path, "2024/01/1.jpg", "2.jpg")
    assert rows_of(read(tmp_path, SourceKind.IMAGES)) == {
        "2024/01/1.jpg": (None, None),
        "2.jpg": (None, None),
    }


def test_side_files_are_skipped_and_counted_but_no_other_file_is(tmp_path: Path) -> None:
    side = [
        "README.md",
        "LICENSE",
        "notes.txt",
        "cat/.DS_Store",
        "cat/Thumbs.db",
        ".git/config",
        "cat/desktop.ini",
    ]
    write_files(
        tmp_path,
        *side,
        "_SUCCESS",
        "__MACOSX/cat/1.jpg",
        "lost+found/#1.jpg",
        "cat/1.jpg",
        "cat/2.txt",
        "cat/3.pdf",
        "cat/LICENSE",
    )
    (tmp_path / "cat/empty.jpg").write_bytes(b"")
    scan = read(tmp_path)
    assert set(rows_of(scan)) == {"cat/1.jpg", "cat/2.txt", "cat/3.pdf", "cat/LICENSE", "cat/empty.jpg"}
    assert scan.skipped == {"side_file": 3, "hidden": 7}


@pytest.mark.parametrize("kind", [None, SourceKind.IMAGES])
def test_a_list_of_the_images_beside_them_is_no_sample_and_told(
    tmp_path: Path, kind: SourceKind | None
) -> None:
    write_files(tmp_path, "train/1.jpg", "train/metadata.csv", "test/2.jpg", "test/metadata.jsonl")
    scan = read(tmp_path, kind)
    assert rows_of(scan) == {"test/2.jpg": (None, "test"), "train/1.jpg": (None, "train")}
    assert scan.skipped == {"image_list": 2}
    (warning,) = scan.warnings
    assert "2 (test/metadata.jsonl, train/metadata.csv)" in warning
    assert "freeze the list" in warning


def test_a_file_in_a_class_folder_is_a_sample_whatever_its_name(tmp_path: Path) -> None:
    write_files(tmp_path, "cat/1.jpg", "cat/metadata.csv")
    assert list(rows_of(read(tmp_path))) == ["cat/1.jpg", "cat/metadata.csv"]


def test_a_class_folder_without_samples_is_told(tmp_path: Path) -> None:
    write_files(tmp_path, "cat/1.jpg", "dog/.DS_Store")
    assert "class folders without a sample: 1 (dog)" in read(tmp_path).warnings


def test_keys_of_any_characters_come_back_exactly(tmp_path: Path) -> None:
    keys = ["a b/+%41 ä.jpg", "a b/new\nline.jpg", "A b/+%41 ä.jpg", "a b/#?&'\".jpg"]
    write_files(tmp_path, *keys)
    scan = read(tmp_path)
    assert set(rows_of(scan)) == set(keys)
    assert set(scan.samples["uri"].to_pylist()) == {f"{tmp_path}/{key}" for key in keys}


def test_a_file_that_changes_gets_another_content_id(tmp_path: Path) -> None:
    write_files(tmp_path, "cat/1.jpg", "cat/2.jpg")
    before = read(tmp_path).samples["content_id"].to_pylist()
    (tmp_path / "cat/1.jpg").write_bytes(jpeg_bytes(77) + b"longer")
    after = read(tmp_path).samples["content_id"].to_pylist()
    assert before[0] != after[0]
    assert before[1] == after[1]


def test_listing_by_ranges_loses_and_doubles_nothing(tmp_path: Path) -> None:
    keys = [
        f"{folder}/{file}" for folder in ("a", "a-b", "a.b", "a0", "b/a", "b/b", "b-a/x/y") for file in "01"
    ]
    write_files(tmp_path, *keys, "a!", "b.jpg", "zz")
    scan = read(tmp_path, SourceKind.IMAGES)
    assert sorted(scan.samples["sample_id"].to_pylist()) == sorted([*keys, "a!", "b.jpg", "zz"])


class _Bucket(S3Store):
    """Has objects at keys that no folder on a disk can have."""

    def __init__(self, *keys: str) -> None:
        super().__init__("bucket")
        self.keys = sorted(keys)
        self.asked_for: list[str] = []

    def list_folders(self, prefix: str = "") -> list[str]:
        self.asked_for.append(prefix)
        below = (key.removeprefix(prefix) for key in self.keys if key.startswith(prefix))
        return sorted({key.partition("/")[0] for key in below if "/" in key})

    def list_objects(self, prefix: str = "", *, start_after: str = "") -> Iterator[ObjectInfo]:
        found = (key for key in self.keys if key.startswith(prefix) and key > start_after)
        return (ObjectInfo(key=key, size_bytes=1, etag="e") for key in found)


def test_an_object_at_the_border_of_two_ranges_is_listed_once() -> None:
    bucket = _Bucket("cats/", "cats/1.jpg", "dogs/", "dogs/old/", "dogs/old/1.jpg")
    ranges = map_listing(SourceRoot(store=bucket), lambda objects: [one.key for one in objects])
    assert [key for keys in ranges for key in keys] == bucket.keys


def test_the_folders_of_a_prefix_are_asked_for_once() -> None:
    bucket = _Bucket("train/cat/1.jpg", "train/dog/2.jpg", "test/cat/3.jpg")
    assert list(rows_of(read_folders(SourceRoot(store=bucket), LabelRule.FOLDERS))) == bucket.keys
    assert sorted(bucket.asked_for) == ["", "test/", "train/"]


@pytest.mark.parametrize(
    ("keys", "where"),
    [
        (["/cat/1.jpg", "/dog/2.jpg"], "s3://bucket//"),
        (["/dog/1.jpg", "train/cat/2.jpg", "test/cat/3.jpg"], "s3://bucket//"),
        (["train/cat/1.jpg", "train//dog/2.jpg", "test/cat/3.jpg"], "s3://bucket/train//"),
    ],
)
def test_a_double_slash_is_no_class_folder(keys: list[str], where: str) -> None:
    with pytest.raises(DataError, match="double slash") as caught:
        read_folders(SourceRoot(store=_Bucket(*keys)), LabelRule.FOLDERS)
    assert caught.value.where == where


def test_a_double_slash_is_harmless_without_labels() -> None:
    bucket = _Bucket("/cat/1.jpg", "/2.jpg", "cat//3.jpg")
    assert list(rows_of(read_folders(SourceRoot(store=bucket), LabelRule.NONE))) == bucket.keys


def test_the_kind_is_found_by_looking(tmp_path: Path) -> None:
    write_files(tmp_path / "folders", "cat/1.jpg")
    write_files(tmp_path / "tars", "data/0.tar", ".hidden.jpg", "readme.md")
    write_files(tmp_path, "list.csv", "list.jsonl")
    assert find_kind(str(tmp_path / "folders")) is SourceKind.FOLDERS
    assert find_kind(str(tmp_path / "tars")) is SourceKind.TARS
    assert find_kind(str(tmp_path / "tars/data/0.tar")) is SourceKind.TARS
    assert find_kind(str(tmp_path / "list.csv")) is SourceKind.LIST
    assert find_kind(str(tmp_path / "list.jsonl")) is SourceKind.LIST


def test_mixed_kinds_need_a_choice(tmp_path: Path) -> None:
    write_files(tmp_path, "cat/1.jpg")
    (tmp_path / "0.tar").write_bytes(shard_bytes({"0": "cat"}))
    with pytest.raises(DataError, match="folders, tars"):
        find_kind(str(tmp_path))
    assert read(tmp_path, SourceKind.TARS).samples["label"].to_pylist() == ["cat"]


def test_compressed_archives_are_refused(tmp_path: Path) -> None:
    write_files(tmp_path, "train.tar.gz", "test.zip")
    with pytest.raises(DataError, match="compressed"):
        find_kind(str(tmp_path))


def test_options_of_another_kind_are_refused(tmp_path: Path) -> None:
    write_files(tmp_path, "cat/1.jpg")
    with pytest.raises(ConfigError, match="images_root"):
        read_source(str(tmp_path), ReadingOptions(images_root="/data"))
    with pytest.raises(ConfigError, match="label_column"):
        read_source(str(tmp_path / "list.csv"), ReadingOptions(labels="none", label_column="breed"))


@pytest.mark.parametrize(
    ("kind", "option"),
    [
        ("folders", "image_column"),
        ("folders", "label_column"),
        ("tars", "label_column"),
        ("tars", "id_column"),
        ("list", "image_column"),
        ("list", "id_column"),
        ("inventory", "label_column"),
        ("parquet", "images_root"),
    ],
)
def test_an_option_that_a_kind_does_not_have_is_refused(tmp_path: Path, kind: str, option: str) -> None:
    with pytest.raises(ConfigError, match=f"{option} belongs to .* is {kind}"):
        read_source(str(tmp_path), ReadingOptions(kind=kind, **{option: "class"}))


def test_the_workspace_below_a_bucket_is_no_part_of_the_source() -> None:
    bucket = _Bucket(
        "cat/1.jpg", "convoy/datasets/pets/current.json", "convoys/2.jpg", "nested/convoy/runs/a.json"
    )
    root = SourceRoot(store=bucket, workspace_key="convoy/")
    assert list(rows_of(read_folders(root, LabelRule.FOLDERS))) == [
        "cat/1.jpg",
        "convoys/2.jpg",
        "nested/convoy/runs/a.json",
    ]
    nested = SourceRoot(store=bucket, workspace_key="nested/convoy/")
    assert nested.list_folders() == ["cat", "convoy", "convoys"]
    assert SourceRoot.open("s3://bucket/", "s3://bucket/a/b").workspace_key == "a/b/"
    assert SourceRoot.open("s3://bucket/a", "s3://bucket/ab").workspace_key == ""
    with pytest.raises(ConfigError, match="the workspace itself"):
        SourceRoot.open("s3://bucket/a/", "s3://bucket/a")
