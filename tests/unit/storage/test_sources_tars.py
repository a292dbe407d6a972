"""WebDataset tar shards as a source."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from convoy.core.errors import DataError
from convoy.storage.datasets import freeze_dataset
from convoy.storage.local_store import LocalStore
from convoy.storage.sources.reading import read_source
from convoy.storage.sources.rows import ReadingOptions, SourceKind, SourceScan
from made_sources import jpeg_bytes, shard_bytes, tar_bytes


def read(path: Path, **options: str) -> SourceScan:
    kind, scan = read_source(str(path), ReadingOptions(**options))
    assert kind is SourceKind.TARS
    return scan


def labels_of(scan: SourceScan) -> dict[str, str | None]:
    return {row["sample_id"]: row["label"] for row in scan.samples.to_pylist()}


def test_members_are_found_by_their_offsets(tmp_path: Path) -> None:
    shard = shard_bytes({"a/000": "cat", "a/001": "dog"})
    (tmp_path / "train-000.tar").write_bytes(shard)
    (tmp_path / "val-000.tar").write_bytes(shard_bytes({"a/000": "cat"}))
    rows = read(tmp_path).samples.to_pylist()
    assert [(row["sample_id"], row["label"], row["split"]) for row in rows] == [
        ("train-000.tar#a/000", "cat", "train"),
        ("train-000.tar#a/001", "dog", "train"),
        ("val-000.tar#a/000", "cat", "val"),
    ]
    start = rows[1]["offset_bytes"]
    assert shard[start : start + rows[1]["size_bytes"]] == jpeg_bytes(1)
    assert len({row["content_id"] for row in rows}) == 3


def test_labels_come_from_cls_then_json_then_txt(tmp_path: Path) -> None:
    members = {
        "0.jpg": jpeg_bytes(0),
        "0.txt": b"a caption",
        "0.json": b'{"label": 5}',
        "0.cls": b"7\n",
        "1.json": json.dumps({"label": "dog"}).encode(),
        "1.txt": b"a caption",
        "1.PNG": jpeg_bytes(1),
        "2.jpeg": jpeg_bytes(2),
        "2.json": b'{"width": 3}',
        "2.txt": "ä".encode(),
        "3.input.webp": jpeg_bytes(3),
    }
    (tmp_path / "0.tar").write_bytes(tar_bytes(members))
    assert labels_of(read(tmp_path / "0.tar")) == {
        "0.tar#0": "7",
        "0.tar#1": "dog",
        "0.tar#2": "ä",
        "0.tar#3": None,
    }


def test_without_labels_no_label_is_read(tmp_path: Path) -> None:
    members = {"0.jpg": jpeg_bytes(0), "0.txt": b"a caption", "1.jpg": jpeg_bytes(1), "1.json": b"{"}
    (tmp_path / "0.tar").write_bytes(tar_bytes(members))
    assert labels_of(read(tmp_path, labels="none")) == {"0.tar#0": None, "0.tar#1": None}


def test_members_of_a_sample_need_not_be_neighbours(tmp_path: Path) -> None:
    names = [
        "./0.jpg",
        "./1.jpg",
        "./._0.jpg",
        "./1.cls",
        "./0.cls",
        f"./{'long/' * 40}2.jpg",
        f"./{'long/' * 40}2.cls",
    ]
    members = {name: jpeg_bytes(0) if name.endswith("jpg") else name[2:3].encode() for name in names}
    (tmp_path / "0.tar").write_bytes(tar_bytes(members))
    assert labels_of(read(tmp_path)) == {"0.tar#1": "1", "0.tar#0": "0", f"0.tar#{'long/' * 40}2": "l"}


def test_samples_without_an_image_are_left_out_with_a_warning(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(tar_bytes({"0.cls": b"1", "1.jpg": jpeg_bytes(0), "1.cls": b"1"}))
    scan = read(tmp_path)
    assert labels_of(scan) == {"0.tar#1": "1"}
    assert scan.skipped == {"no_image": 1}
    assert "0.tar#0" in scan.warnings[0]


def test_hard_links_are_read_at_their_files_and_other_links_are_counted(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in (("./0.jpg", jpeg_bytes(0)), ("./0.cls", b"cat")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for name, kind, target in (
            ("./1.jpg", tarfile.LNKTYPE, "./0.jpg"),
            ("./1.cls", tarfile.LNKTYPE, "./0.cls"),
            ("./2.jpg", tarfile.SYMTYPE, "0.jpg"),
            ("./3.jpg", tarfile.LNKTYPE, "./elsewhere.jpg"),
            ("./._0.jpg", tarfile.SYMTYPE, "0.jpg"),
        ):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, target
            archive.addfile(link)
    (tmp_path / "0.tar").write_bytes(buffer.getvalue())
    scan = read(tmp_path)
    assert labels_of(scan) == {"0.tar#0": "cat", "0.tar#1": "cat"}
    assert len(set(scan.samples["offset_bytes"].to_pylist())) == 1
    assert set(scan.samples["size_bytes"].to_pylist()) == {len(jpeg_bytes(0))}
    assert scan.skipped == {"link": 2}
    assert "2 (0.tar#2.jpg, 0.tar#3.jpg)" in scan.warnings[0]


def test_images_packed_as_sparse_files_are_left_out_with_a_warning(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        add_sparse(archive, "0.jpg", b"a" * 512, hole_bytes=2048)
        add_sparse(archive, "1.json", b'{"label": "dog"}', hole_bytes=0)
        for name, data in (("0.cls", b"cat"), ("1.jpg", jpeg_bytes(1)), ("1.txt", b"a caption")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("2.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "0.jpg"
        archive.addfile(link)
    (tmp_path / "0.tar").write_bytes(buffer.getvalue())
    scan = read(tmp_path)
    assert labels_of(scan) == {"0.tar#1": "dog"}
    assert scan.skipped == {"sparse": 2}
    assert "2 (0.tar#0, 0.tar#2); write the shard again without `tar -S`" in scan.warnings[0]
    start = scan.samples["offset_bytes"][0].as_py()
    assert buffer.getvalue()[start:].startswith(jpeg_bytes(1))


def add_sparse(archive: tarfile.TarFile, name: str, data: bytes, *, hole_bytes: int) -> None:
    """A member as `tar -S` writes it: its data, a hole behind it, and a map that says so (GNU sparse 1.0)."""
    packed = f"1\n0\n{len(data)}\n".encode().ljust(512, b"\0") + data
    member = tarfile.TarInfo(f"GNUSparseFile.0/{name}")
    member.size = len(packed)
    member.pax_headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": name,
        "GNU.sparse.realsize": str(len(data) + hole_bytes),
    }
    archive.addfile(member, io.BytesIO(packed))


def test_two_images_need_a_choice(tmp_path: Path) -> None:
    shard = tar_bytes({"0.input.jpg": jpeg_bytes(0), "0.seg.png": jpeg_bytes(1)})
    (tmp_path / "0.tar").write_bytes(shard)
    with pytest.raises(DataError, match="two images"):
        read(tmp_path)
    (row,) = read(tmp_path, image_column="seg.png").samples.to_pylist()
    assert shard[row["offset_bytes"] :].startswith(jpeg_bytes(1))


def test_a_shard_that_is_cut_off_keeps_its_whole_samples(tmp_path: Path) -> None:
    shard = shard_bytes({"0": "cat", "1": "dog", "2": "cat"})
    whole = read_offsets(tmp_path, shard)
    for cut in (whole["2"] - 700, whole["2"] - 512, whole["2"] - 100, whole["2"], whole["2"] + 5):
        path = tmp_path / "cut.tar"
        path.write_bytes(shard[:cut])
        scan = read(path)
        assert set(labels_of(scan)) <= {"cut.tar#0", "cut.tar#1"}, cut
        assert "cut.tar#0" in labels_of(scan)
        assert "cut.tar is cut off" in scan.warnings[0]
        assert scan.incomplete == (str(path),)


def read_offsets(tmp_path: Path, shard: bytes) -> dict[str, int]:
    (tmp_path / "whole.tar").write_bytes(shard)
    rows = read(tmp_path / "whole.tar").samples.to_pylist()
    return {row["sample_id"].partition("#")[2]: row["offset_bytes"] for row in rows}


def test_a_damaged_header_in_the_middle_is_no_end(tmp_path: Path) -> None:
    shard = bytearray(shard_bytes({"0": "cat", "1": "dog", "2": "cat"}))
    header = read_offsets(tmp_path, bytes(shard))["1"] - 512
    shard[header : header + 100] = b"\xff" * 100
    (tmp_path / "bad.tar").write_bytes(shard)
    scan = read(tmp_path / "bad.tar")
    assert f"{header:,} of {len(shard):,} bytes are readable" in scan.warnings[0]


def test_joined_archives_give_the_samples_of_the_first_with_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "all.tar"
    first = shard_bytes({"0": "cat"})
    path.write_bytes(first + shard_bytes({"1": "dog"}))
    scan = read(path)
    assert labels_of(scan) == {"all.tar#0": "cat"}
    assert f"what follows byte {len(first):,} of" in scan.warnings[0]
    assert "tar --concatenate" in scan.warnings[0]
    assert scan.incomplete == (str(path),)


def test_zeros_behind_the_end_are_no_loss(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(shard_bytes({"0": "cat"}) + bytes(100_000))
    scan = read(tmp_path)
    assert (scan.warnings, scan.incomplete) == ((), ())


def test_what_is_no_tar_is_refused(tmp_path: Path) -> None:
    for data in (b"", b"PK\x03\x04" * 400):
        (tmp_path / "0.tar").write_bytes(data)
        with pytest.raises(DataError, match="not a tar"):
            read(tmp_path)


def test_a_member_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(tar_bytes({"\udce4.jpg": jpeg_bytes(0)}))
    with pytest.raises(DataError, match="not UTF-8"):
        read(tmp_path)


def test_names_of_what_is_no_sample_may_be_of_any_bytes(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(tar_bytes({"\udce4.cls": b"1", "1.jpg": jpeg_bytes(0), "1.cls": b"1"}))
    version = freeze_dataset(LocalStore(str(tmp_path / "workspace")), "pets", str(tmp_path / "0.tar"))
    assert version.skipped == {"no_image": 1}
    assert "0.tar#\\udce4" in version.warnings[0]


def test_hidden_members_are_counted(tmp_path: Path) -> None:
    members = {".staging/0.jpg": jpeg_bytes(0), "1.jpg": jpeg_bytes(1), "a/.2.jpg": jpeg_bytes(2)}
    (tmp_path / "0.tar").write_bytes(tar_bytes(members))
    scan = read(tmp_path)
    assert list(labels_of(scan)) == ["0.tar#1"]
    assert scan.skipped == {"hidden": 2}


def test_a_label_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for name, data in (("0.json", b"{"), ("0.json", b'{"label": [1]}'), ("0.cls", b"\xff\xfe")):
        (tmp_path / "0.tar").write_bytes(tar_bytes({"0.jpg": jpeg_bytes(0), name: data}))
        with pytest.raises(DataError, match=r"label"):
            read(tmp_path)


def test_a_broken_label_that_another_comes_before_is_none(tmp_path: Path) -> None:
    members = {"0.jpg": jpeg_bytes(0), "0.json": b"{", "0.txt": b"\xff\xfe", "0.cls": b"cat"}
    members |= {"1.txt": b"\xff\xfe", "1.json": b'{"label": "dog"}', "1.jpg": jpeg_bytes(1)}
    (tmp_path / "0.tar").write_bytes(tar_bytes(members))
    assert labels_of(read(tmp_path)) == {"0.tar#0": "cat", "0.tar#1": "dog"}
    (tmp_path / "0.tar").write_bytes(
        tar_bytes({**members, "2.jpg": jpeg_bytes(2), "2.json": b"{", "2.txt": b"owl"})
    )
    with pytest.raises(DataError, match=r"label cannot be read .*2\.json in"):
        read(tmp_path)


def test_json_nested_too_deeply_is_no_label(tmp_path: Path) -> None:
    members = {"0.jpg": jpeg_bytes(0), "0.json": b"[" * 200_000}
    (tmp_path / "0.tar").write_bytes(tar_bytes({**members, "0.cls": b"cat"}))
    assert labels_of(read(tmp_path)) == {"0.tar#0": "cat"}
    (tmp_path / "0.tar").write_bytes(tar_bytes(members))
    with pytest.raises(DataError, match=r"label cannot be read .*0\.json in"):
        read(tmp_path)
