"""Reports of S3 Inventory as a source: the same samples as from a listing, and nothing that cannot be read."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from convoy.core.errors import ChecksumMismatch, ConfigError, DataError, ExitCode, StorageFull
from convoy.storage.object_store import ObjectInfo
from convoy.storage.sources.reading import find_kind, read_source
from convoy.storage.sources.rows import LabelRule, ReadingOptions, SourceKind, SourceScan, object_content_id
from made_inventories import (
    DATED,
    MANIFEST_KEY,
    REPORT,
    SMALL_FIELDS,
    entry,
    made_report,
    md5,
    write_report,
)

FORMATS = ["CSV", "Parquet"]
INVENTORY_FILES = "convoy.storage.sources.inventory_files"


def read(uri: Path | str, **options: Any) -> SourceScan:
    kind, scan = read_source(str(uri), ReadingOptions(**options))
    assert kind is SourceKind.INVENTORY
    return scan


def rows_of(scan: SourceScan) -> dict[str, tuple[str | None, str | None]]:
    rows = scan.samples.select(["sample_id", "label", "split"]).to_pylist()
    return {row["sample_id"]: (row["label"], row["split"]) for row in rows}


def checksums_of(scan: SourceScan) -> dict[str, str | None]:
    return dict(zip(*(scan.samples[name].to_pylist() for name in ("sample_id", "checksum")), strict=True))


@pytest.mark.parametrize("file_format", FORMATS)
def test_samples_of_all_files_have_place_version_and_checksum(tmp_path: Path, file_format: str) -> None:
    files = [[entry("cat/1.jpg", b"one"), entry("dog/2.jpg", b"two!")], [entry("cat/3.jpg", b"three")]]
    write_report(tmp_path, made_report("photos", files, file_format=file_format))
    scan = read(tmp_path / MANIFEST_KEY)
    assert rows_of(scan) == {
        "cat/1.jpg": ("cat", None),
        "dog/2.jpg": ("dog", None),
        "cat/3.jpg": ("cat", None),
    }
    row = scan.samples.slice(1, 1).to_pylist()[0]
    assert row["uri"] == "s3://photos/dog/2.jpg"
    assert (row["etag"], row["size_bytes"], row["checksum"]) == (md5(b"two!"), 4, f"md5:{md5(b'two!')}")
    listed = ObjectInfo(key="dog/2.jpg", size_bytes=4, etag=row["etag"], checksum=f"md5:{row['etag']}")
    assert row["content_id"] == object_content_id(row["uri"], listed)


@pytest.mark.parametrize("file_format", FORMATS)
def test_keys_of_any_characters_come_back_exactly(tmp_path: Path, file_format: str) -> None:
    keys = ["a b/+%41 ä.jpg", "a b/new\nline.jpg", 'a b/"quoted", 日本.jpg', "a b/c%2Bd+e.jpg"]
    files = [[entry(key, key.encode()) for key in keys]]
    write_report(tmp_path, made_report("photos", files, file_format=file_format))
    assert set(rows_of(read(tmp_path / MANIFEST_KEY))) == set(keys)


@pytest.mark.parametrize("file_format", FORMATS)
def test_what_cannot_be_read_now_is_left_out_and_counted(tmp_path: Path, file_format: str) -> None:
    rows = [
        entry("cat/1.jpg"),
        entry("cat/1.jpg", b"before", IsLatest=False),
        entry("cat/gone.jpg", IsDeleteMarker=True, Size=None, ETag=None),
        entry("cat/gone.jpg", IsLatest=False),
        entry("cat/cold.jpg", StorageClass="GLACIER"),
        entry("dog/colder.jpg", StorageClass="DEEP_ARCHIVE"),
        entry("cat/instant.jpg", StorageClass="GLACIER_IR"),
        entry("cat/tiered.jpg", StorageClass="INTELLIGENT_TIERING", IntelligentTieringAccessTier="ARCHIVE"),
        entry("cat/", b""),
        entry("cat/.DS_Store"),
        entry("README.md"),
        entry("stray.jpg"),
    ]
    write_report(tmp_path, made_report("photos", [rows], file_format=file_format))
    scan = read(tmp_path / MANIFEST_KEY)
    assert set(rows_of(scan)) == {"cat/1.jpg", "cat/instant.jpg"}
    assert scan.skipped == {
        "old_version": 2,
        "delete_marker": 1,
        "archived": 3,
        "hidden": 1,
        "side_file": 1,
        "no_class": 1,
    }
    told = "\n".join(scan.warnings)
    assert "2026-11-20 00:00 UTC" in told
    assert "archived objects were left out: 3" in told
    assert "class folders without a sample: 1 (dog)" in told


def test_a_workspace_in_the_bucket_is_no_part_of_the_source(tmp_path: Path) -> None:
    keys = ["in/cat/1.jpg", "in/convoy/runs/a.json", "in/convoys/2.jpg"]
    write_report(tmp_path, made_report("photos", [[entry(key) for key in keys]]))
    report, options = str(tmp_path / MANIFEST_KEY), ReadingOptions(images_root="s3://photos/in")
    scan = read_source(report, options, workspace="s3://photos/in/convoy")[1]
    assert rows_of(scan) == {"cat/1.jpg": ("cat", None), "convoys/2.jpg": ("convoys", None)}
    assert "was left out: convoy/" in scan.warnings[-1]
    with pytest.raises(ConfigError, match="the workspace itself"):
        read_source(report, options, workspace="s3://photos/in")


@pytest.mark.parametrize("file_format", FORMATS)
def test_an_etag_is_a_checksum_only_where_it_is_the_md5(tmp_path: Path, file_format: str) -> None:
    rows = [
        entry("plain.jpg", EncryptionStatus="NOT-SSE"),
        entry("own.jpg", EncryptionStatus="SSE-S3"),
        entry("kms.jpg", EncryptionStatus="SSE-KMS"),
        entry("double.jpg", EncryptionStatus="DSSE-KMS"),
        entry("customer.jpg", EncryptionStatus="SSE-C"),
        entry("parts.jpg", ETag=f"{md5(b'x')}-2"),
        entry("copied.jpg", IsMultipartUploaded=True),
    ]
    write_report(tmp_path, made_report("photos", [rows], file_format=file_format))
    known = {key for key, checksum in checksums_of(read(tmp_path / MANIFEST_KEY)).items() if checksum}
    assert known == {"plain.jpg", "own.jpg"}


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_report_with_few_fields_is_taken_as_a_listing_is(tmp_path: Path, file_format: str) -> None:
    rows = [entry("cat/1.jpg"), entry("cat/2.jpg", ETag=f"{md5(b'x')}-2")]
    write_report(tmp_path, made_report("photos", [rows], file_format=file_format, fields=SMALL_FIELDS))
    checksums = checksums_of(read(tmp_path / MANIFEST_KEY))
    assert checksums == {"cat/1.jpg": f"md5:{md5(b'jpeg')}", "cat/2.jpg": None}


def test_split_folders_are_read_as_from_a_bucket(tmp_path: Path) -> None:
    keys = ["train/cat/1.jpg", "train/cat/deep/2.jpg", "valid/dog/3.jpg", ".git/config", "test/dog/4.jpg"]
    write_report(tmp_path, made_report("photos", [[entry(key) for key in keys]]))
    assert rows_of(read(tmp_path / MANIFEST_KEY)) == {
        "train/cat/1.jpg": ("cat", "train"),
        "train/cat/deep/2.jpg": ("cat", "train"),
        "valid/dog/3.jpg": ("dog", "val"),
        "test/dog/4.jpg": ("dog", "test"),
    }


def test_splits_beside_other_folders_are_ambiguous(tmp_path: Path) -> None:
    keys = ["train/cat/1.jpg", "test/cat/1.jpg", "notes/1.jpg"]
    write_report(tmp_path, made_report("photos", [[entry(key) for key in keys]]))
    with pytest.raises(DataError, match="notes"):
        read(tmp_path / MANIFEST_KEY)


def test_a_double_slash_is_no_class_folder(tmp_path: Path) -> None:
    keys = ["1.jpg", "cat/2.jpg", "/cat/3.jpg"]
    write_report(tmp_path, made_report("photos", [[entry(key) for key in keys]]))
    with pytest.raises(DataError, match="double slash") as caught:
        read(tmp_path / MANIFEST_KEY)
    assert caught.value.where == "s3://photos//"


def test_images_root_chooses_a_part_of_the_bucket_and_names_ids(tmp_path: Path) -> None:
    keys = ["pets/cat/1.jpg", "pets/dog/2.jpg", "pets-2/cat/3.jpg", "logs/2026.txt"]
    write_report(tmp_path, made_report("photos", [[entry(key) for key in keys]]))
    scan = read(tmp_path / MANIFEST_KEY, images_root="s3://photos/pets/")
    assert rows_of(scan) == {"cat/1.jpg": ("cat", None), "dog/2.jpg": ("dog", None)}
    assert scan.samples["uri"].to_pylist() == ["s3://photos/pets/cat/1.jpg", "s3://photos/pets/dog/2.jpg"]
    assert scan.skipped == {"outside": 2}


def test_the_marker_of_the_root_is_no_sample_even_if_it_has_content(tmp_path: Path) -> None:
    write_report(tmp_path, made_report("photos", [[entry("pets/"), entry("pets/1.jpg"), entry("pets/old/")]]))
    scan = read(tmp_path / MANIFEST_KEY, images_root="s3://photos/pets", labels=LabelRule.NONE)
    assert list(rows_of(scan)) == ["1.jpg", "old/"]


@pytest.mark.parametrize("root", ["s3://photos-2/pets", "s3://other", "/data/photos"])
def test_a_root_outside_of_the_bucket_is_refused(tmp_path: Path, root: str) -> None:
    write_report(tmp_path, made_report("photos", [[entry("cat/1.jpg")]]))
    with pytest.raises(ConfigError, match="s3://photos/"):
        read(tmp_path / MANIFEST_KEY, images_root=root)


def test_folders_are_no_labels_where_they_are_told_not_to_be(tmp_path: Path) -> None:
    keys = ["2026/01/1.jpg", "2.jpg", "train/3.jpg"]
    write_report(tmp_path, made_report("photos", [[entry(key) for key in keys]]))
    rows = rows_of(read(tmp_path / MANIFEST_KEY, labels=LabelRule.NONE))
    assert rows == dict.fromkeys(keys, (None, None))


def test_a_report_is_found_by_its_folder_and_by_the_folder_of_all_reports(tmp_path: Path) -> None:
    write_report(tmp_path, made_report("photos", [[entry("old.jpg")]]))
    reports = tmp_path / REPORT
    assert find_kind(str(reports / DATED)) is SourceKind.INVENTORY
    newer = made_report("photos", [[entry("new.jpg")]])
    for key, data in newer.items():
        newer_key = key.replace(DATED, "2026-11-21T00-00Z").replace("/data/", "/data/newer-")
        write_report(tmp_path, {newer_key: data.replace(b"/data/", b"/data/newer-")})
    # One that is still being written.
    (reports / "2026-11-22T00-00Z").mkdir()
    (reports / "2026-11-22T00-00Z/notes").write_bytes(b"not yet")
    assert set(rows_of(read(reports / DATED))) == {"old.jpg"}
    assert set(rows_of(read(reports))) == {"new.jpg"}


@pytest.mark.parametrize("kept", [REPORT, f"{REPORT}/data"])
def test_a_copy_is_read_though_folders_above_are_lost(tmp_path: Path, kept: str) -> None:
    write_report(tmp_path / "whole", made_report("photos", [[entry("1.jpg")], [entry("2.jpg")]]))
    shutil.copytree(tmp_path / "whole" / kept, tmp_path / "copy")
    manifest = tmp_path / "copy" / "manifest.json"
    shutil.copy(tmp_path / "whole" / MANIFEST_KEY, manifest)
    assert set(rows_of(read(manifest))) == {"1.jpg", "2.jpg"}


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    objects = made_report("photos", [[entry("1.jpg")]])
    write_report(tmp_path, {MANIFEST_KEY: objects[MANIFEST_KEY]})
    with pytest.raises(DataError, match=r"data/0000\.csv\.gz"):
        read(tmp_path / MANIFEST_KEY)


def test_a_report_that_has_no_room_on_disk_says_where_and_can_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report(tmp_path, made_report("photos", [[entry("cat/1.jpg")]], file_format="CSV"))
    # The real device on which every write fails with ENOSPC.
    monkeypatch.setattr(f"{INVENTORY_FILES}.TemporaryFile", partial(Path("/dev/full").open, "r+b", 0))
    with pytest.raises(StorageFull, match="No space left") as caught:
        read(tmp_path / MANIFEST_KEY)
    assert caught.value.exit_code is ExitCode.STOPPED_RESUMABLE
    assert "TMPDIR" in caught.value.next_step


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_damaged_file_is_refused(tmp_path: Path, file_format: str) -> None:
    objects = made_report("photos", [[entry("1.jpg")], [entry("2.jpg")]], file_format=file_format)
    victim = sorted(objects)[2]
    assert "/data/0001" in victim
    write_report(tmp_path, {**objects, victim: objects[victim][:-1] + b"!"})
    with pytest.raises(ChecksumMismatch, match="MD5"):
        read(tmp_path / MANIFEST_KEY)


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("field", ["Size", "ETag"])
def test_a_report_without_size_or_etag_is_refused(tmp_path: Path, file_format: str, field: str) -> None:
    fields = [name for name in SMALL_FIELDS if name != field]
    write_report(tmp_path, made_report("photos", [[entry("1.jpg")]], file_format=file_format, fields=fields))
    with pytest.raises(DataError, match="no column"):
        read(tmp_path / MANIFEST_KEY)


def test_orc_is_refused_with_the_way_out(tmp_path: Path) -> None:
    write_report(tmp_path, made_report("photos", [[entry("1.jpg")]], file_format="ORC"))
    with pytest.raises(DataError, match="Parquet or CSV"):
        read(tmp_path / MANIFEST_KEY)


def test_another_manifest_is_no_report(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    write_report(folder, {"manifest.json": json.dumps({"name": "a web app"}).encode(), "1.jpg": b"jpeg"})
    assert find_kind(str(folder)) is SourceKind.FOLDERS
    with pytest.raises(DataError, match="no report of S3 Inventory"):
        read_source(str(folder / "manifest.json"), ReadingOptions())


def test_a_report_of_an_empty_bucket_has_no_samples(tmp_path: Path) -> None:
    write_report(tmp_path, made_report("photos", []))
    assert read(tmp_path / MANIFEST_KEY).samples.num_rows == 0
