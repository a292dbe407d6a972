"""Parquet files with image bytes as a source."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from convoy.core.errors import DataError
from convoy.storage.datasets import freeze_dataset, open_dataset
from convoy.storage.local_store import LocalStore
from convoy.storage.sources.reading import find_kind, read_source
from convoy.storage.sources.rows import ReadingOptions, SourceKind, SourceScan
from made_sources import jpeg_bytes


def read(path: Path, **options: str) -> SourceScan:
    kind, scan = read_source(str(path), ReadingOptions(**options))
    assert kind is SourceKind.PARQUET
    return scan


def hugging_face_table(labels: list[int], names: list[str]) -> pa.Table:
    images = [{"bytes": jpeg_bytes(index), "path": f"{index}.jpg"} for index in range(len(labels))]
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    table = pa.table({"image": images, "label": pa.array(labels, pa.int64())})
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def test_hugging_face_files_give_class_names_splits_and_rows(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    pq.write_table(
        hugging_face_table([1, 0, 1], ["wolf", "ant"]), tmp_path / "data/train-00000-of-00001.parquet"
    )
    pq.write_table(
        hugging_face_table([0], ["wolf", "ant"]), tmp_path / "data/validation-00000-of-00001.parquet"
    )
    (tmp_path / "README.md").write_text("card")
    scan = read(tmp_path)
    rows = scan.samples.to_pylist()
    assert scan.classes == ("wolf", "ant")
    assert scan.skipped == {"not_parquet": 1}
    assert [(row["label"], row["split"]) for row in rows] == [
        ("ant", "train"),
        ("wolf", "train"),
        ("ant", "train"),
        ("wolf", "val"),
    ]
    assert rows[2]["sample_id"] == "data/train-00000-of-00001.parquet#000000002"
    assert (rows[2]["row_index"], rows[2]["container_field"], rows[2]["size_bytes"]) == (
        2,
        "image.bytes",
        None,
    )
    assert len({row["content_id"] for row in rows}) == 4


def test_rows_with_an_id_column_keep_ids_and_splits_when_a_row_before_them_goes(tmp_path: Path) -> None:
    store, folder = LocalStore(str(tmp_path / "workspace")), tmp_path / "source"
    folder.mkdir()
    reading = ReadingOptions(id_column="name")

    def splits_by_id(rows: list[int]) -> dict[str, str]:
        table = pa.table(
            {"image": [jpeg_bytes(row) for row in rows], "name": rows, "label": ["cat"] * len(rows)}
        )
        pq.write_table(table, folder / "a.parquet")
        version = freeze_dataset(store, "pets", str(folder), reading=reading)
        assert not any("rewritten" in warning for warning in version.warnings)
        rows_of = open_dataset(store, "pets").read_table(["sample_id", "split"]).to_pydict()
        return dict(zip(rows_of["sample_id"], rows_of["split"], strict=True))

    before = splits_by_id(list(range(100)))
    after = splits_by_id([row for row in range(100) if row != 3])
    assert before.pop("a.parquet#000000003")
    assert after == before
    rows = open_dataset(store, "pets").read_table(["sample_id", "row_index"]).to_pylist()
    assert rows[-1] == {"sample_id": "a.parquet#000000099", "row_index": 98}


def test_ids_are_texts_or_integers(tmp_path: Path) -> None:
    table = {
        "image": [jpeg_bytes(0), jpeg_bytes(1)],
        "name": ["b", "a"],
        "nothing": ["b", None],
        "number": [1.5, 2],
    }
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    assert read(tmp_path, id_column="name").samples["sample_id"].to_pylist() == ["a.parquet#b", "a.parquet#a"]
    for name in ("nothing", "number"):
        with pytest.raises(DataError, match="is no id"):
            read(tmp_path, id_column=name)
    with pytest.raises(DataError, match="no column 'missing'"):
        read(tmp_path, id_column="missing")


def test_a_refresh_warns_where_rows_of_a_file_may_have_taken_the_ids_of_others(tmp_path: Path) -> None:
    store, folder = LocalStore(str(tmp_path / "workspace")), tmp_path / "source"
    folder.mkdir()

    def freeze(name: str, *images: bytes) -> tuple[str, ...]:
        pq.write_table(pa.table({"image": list(images)}), folder / name)
        return freeze_dataset(store, "pets", str(folder)).warnings

    assert freeze("a.parquet", jpeg_bytes(0), jpeg_bytes(1)) == ()
    assert freeze("b.parquet", jpeg_bytes(2)) == ()
    (warning,) = freeze("a.parquet", jpeg_bytes(1))
    assert "1 (a.parquet)" in warning
    assert "reading.id_column" in warning


def test_hidden_labels_of_a_test_split_are_null(tmp_path: Path) -> None:
    pq.write_table(hugging_face_table([-1, -1], ["wolf", "ant"]), tmp_path / "test.parquet")
    assert read(tmp_path / "test.parquet").samples["label"].to_pylist() == [None, None]


def test_an_empty_text_is_no_label(tmp_path: Path) -> None:
    images = [jpeg_bytes(0), jpeg_bytes(1)]
    pq.write_table(pa.table({"image": images, "label": ["", ""]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet").samples["label"].to_pylist() == [None, None]


def test_a_label_beyond_the_class_names_is_refused(tmp_path: Path) -> None:
    pq.write_table(hugging_face_table([2], ["wolf", "ant"]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="2 is no label"):
        read(tmp_path / "a.parquet")


def test_one_file_with_a_plain_binary_column(tmp_path: Path) -> None:
    table = pa.table({"img": [jpeg_bytes(0), jpeg_bytes(1)], "label": ["cat", "dog"], "n": [1, 2]})
    pq.write_table(table, tmp_path / "pets.parquet")
    rows = read(tmp_path / "pets.parquet").samples.to_pylist()
    assert [(row["sample_id"], row["label"], row["split"]) for row in rows] == [
        ("pets.parquet#000000000", "cat", None),
        ("pets.parquet#000000001", "dog", None),
    ]
    assert rows[0]["container_field"] == "img"


def test_without_labels_no_label_column_is_looked_for(tmp_path: Path) -> None:
    pq.write_table(hugging_face_table([0, -1, 7], ["wolf", "ant"]), tmp_path / "a.parquet")
    scan = read(tmp_path, labels="none")
    assert scan.samples["label"].to_pylist() == [None, None, None]
    assert scan.classes is None


def test_unclear_columns_need_a_choice(tmp_path: Path) -> None:
    table = pa.table({"photo": [b"a"], "mask": [b"b"], "label": ["cat"], "breed": ["manx"]})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="photo, mask"):
        read(tmp_path / "a.parquet")
    scan = read(tmp_path / "a.parquet", image_column="photo", label_column="breed")
    assert (scan.samples["container_field"][0].as_py(), scan.samples["label"][0].as_py()) == ("photo", "manx")
    with pytest.raises(DataError, match="no column 'pic'"):
        read(tmp_path / "a.parquet", image_column="pic")


def test_a_column_that_no_worker_can_read_is_refused(tmp_path: Path) -> None:
    images = pa.array([jpeg_bytes(0)])
    table = pa.table({"image": images, "coded": images.dictionary_encode(), "path": ["1.jpg"]})
    pq.write_table(table, tmp_path / "a.parquet")
    for name in ("coded", "path"):
        with pytest.raises(DataError, match=f"'{name}' of .* holds no image bytes"):
            read(tmp_path, image_column=name)
    features = {"info": {"features": {"path": {"_type": "Image"}}}}
    declared = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(declared, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="'path' of string"):
        read(tmp_path)


def test_a_parquet_with_paths_is_a_list(tmp_path: Path) -> None:
    pq.write_table(pa.table({"path": ["1.jpg"]}), tmp_path / "a.parquet")
    assert find_kind(str(tmp_path / "a.parquet")) is SourceKind.LIST


def test_a_list_may_have_a_binary_column_that_is_no_image(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    (tmp_path / "1.jpg").write_bytes(jpeg_bytes(0))
    pq.write_table(pa.table({"path": ["1.jpg"], "hash": [b"\x01"], "label": ["cat"]}), path)
    kind, scan = read_source(str(path), ReadingOptions())
    assert kind is SourceKind.LIST
    assert scan.samples["uri"].to_pylist() == [str(tmp_path / "1.jpg")]


def test_images_may_have_a_path_beside_them(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    for table in (
        pa.table({"path": ["1.jpg"], "image": [jpeg_bytes(0)]}),
        pa.table({"path": ["1.jpg"], "photo": [{"bytes": jpeg_bytes(0), "path": "1.jpg"}]}),
    ):
        pq.write_table(table, path)
        assert find_kind(str(path)) is SourceKind.PARQUET
    pq.write_table(pa.table({"path": ["1.jpg"], "photo": [jpeg_bytes(0)]}), path)
    assert read(path, image_column="photo").samples["container_field"].to_pylist() == ["photo"]


def test_a_list_of_which_no_file_exists_asks_whether_it_holds_the_images_itself(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    columns = {"path": ["1.jpg", "2.jpg"], "photo": [jpeg_bytes(0), jpeg_bytes(1)]}
    pq.write_table(pa.table(columns), path)
    with pytest.raises(DataError, match=r"2 rows cannot be used[\s\S]*\(photo\).*reading\.image_column"):
        read(path)
    (tmp_path / "1.jpg").write_bytes(jpeg_bytes(0))
    with pytest.raises(DataError, match="1 rows cannot be used") as caught:
        read(path)
    assert "image_column" not in str(caught.value)


def test_files_that_name_classes_differently_are_refused(tmp_path: Path) -> None:
    pq.write_table(hugging_face_table([0], ["wolf", "ant"]), tmp_path / "0.parquet")
    pq.write_table(hugging_face_table([0], ["ant", "wolf"]), tmp_path / "1.parquet")
    with pytest.raises(DataError, match="differ"):
        read(tmp_path)


@pytest.mark.parametrize("names", [["cat", "ant"], ["ant", "wolf"], []])
def test_a_refresh_refuses_class_names_that_the_unchanged_files_do_not_have(
    tmp_path: Path, names: list[str]
) -> None:
    store, source = LocalStore(str(tmp_path / "workspace")), tmp_path / "source"
    source.mkdir()
    for name in ("0.parquet", "1.parquet"):
        pq.write_table(hugging_face_table([0, 1], ["wolf", "ant"]), source / name)
    freeze_dataset(store, "pets", str(source))
    pq.write_table(hugging_face_table([0, 1, 1], names), source / "0.parquet")
    with pytest.raises(DataError, match=r"here, .*'wolf', 'ant'.* in 1\.parquet"):
        freeze_dataset(store, "pets", str(source))


@pytest.mark.parametrize(
    ("names", "problem"),
    [(["train-0.parquet", "extra-0.parquet"], "extra-0"), (["train/test-0.parquet"], "several splits")],
)
def test_unclear_splits_are_refused(tmp_path: Path, names: list[str], problem: str) -> None:
    for name in names:
        os.makedirs((tmp_path / name).parent, exist_ok=True)
        pq.write_table(hugging_face_table([0], ["wolf"]), tmp_path / name)
    with pytest.raises(DataError, match=problem):
        read(tmp_path)


def test_files_with_large_row_groups_are_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = hugging_face_table([0] * 20, ["wolf"])
    pq.write_table(table, tmp_path / "large.parquet")
    pq.write_table(table, tmp_path / "small.parquet", row_group_size=5)
    assert read(tmp_path).warnings == ()
    monkeypatch.setattr("convoy.storage.sources.parquets._LARGE_GROUP_BYTES", 10 * len(jpeg_bytes(0)))
    (warning,) = read(tmp_path).warnings
    assert "1 (large.parquet)" in warning
    assert "row groups of a few hundred images" in warning


def test_odd_features_metadata_is_ignored(tmp_path: Path) -> None:
    metadatas: list[Any] = ["not json", '{"info": null}', "[]"]
    for index, metadata in enumerate(metadatas):
        table = pa.table({"image": [jpeg_bytes(0)]}).replace_schema_metadata({"huggingface": metadata})
        pq.write_table(table, tmp_path / f"{index}.parquet")
    assert read(tmp_path).samples.num_rows == 3
