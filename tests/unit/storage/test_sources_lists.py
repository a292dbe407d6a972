"""Lists as a source: CSV, JSONL, parquet, and every way in which a row can be wrong."""

from __future__ import annotations

import json
import os
from hashlib import md5, sha256
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from convoy.core.errors import DataError
from convoy.storage.local_store import LocalStore
from convoy.storage.sources.lists import _by_folder, _find_in_folder
from convoy.storage.sources.reading import read_source
from convoy.storage.sources.rows import ReadingOptions, SourceKind
from made_sources import jpeg_bytes, write_files


def read(path: Path, **options: str) -> list[dict[str, object]]:
    kind, scan = read_source(str(path), ReadingOptions(**options))
    assert kind is SourceKind.LIST
    return scan.samples.to_pylist()


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_files(tmp_path, "images/1.jpg", "images/2.jpg", "images/deep/3.jpg", "b,c d.jpg")
    return tmp_path


def test_csv_with_all_columns(root: Path) -> None:
    checksum = sha256((root / "images/1.jpg").read_bytes()).hexdigest()
    text = f"path,label,split,id,weight,sha256,author\nimages/1.jpg,cat,valid,one,2.5,{checksum.upper()},me\n"
    (row,) = read(write(root / "list.csv", text))
    assert (row["sample_id"], row["label"], row["split"], row["weight"]) == ("one", "cat", "val", 2.5)
    assert row["checksum"] == f"sha256:{checksum}"
    assert row["uri"] == f"{root}/images/1.jpg"
    assert row["size_bytes"] == (root / "images/1.jpg").stat().st_size
    assert row["etag"]


def test_byte_order_mark_crlf_and_quotes(root: Path) -> None:
    text = '\ufefffile_name,label\r\nimages/1.jpg,"a ""cat"""\r\n"b,c d.jpg","two\nlines"\r\n'
    rows = read(write(root / "list.csv", text))
    assert [(row["sample_id"], row["label"]) for row in rows] == [
        ("images/1.jpg", 'a "cat"'),
        ("b,c d.jpg", "two\nlines"),
    ]


def test_file_uris_are_percent_decoded_and_paths_are_taken_literally(root: Path) -> None:
    write_files(root, "100%25.jpg")
    (uri, path) = read(write(root / "a.csv", f"path\nfile://{root}/b%2Cc%20d.jpg\n100%25.jpg\n"))
    assert (uri["uri"], path["uri"]) == (f"{root}/b,c d.jpg", f"{root}/100%25.jpg")
    assert uri["sample_id"] == f"file://{root}/b%2Cc%20d.jpg"


def test_without_labels_a_partly_labelled_list_is_unlabelled(root: Path) -> None:
    records = [{"path": "images/1.jpg", "label": ["a", "b"]}, {"path": "images/2.jpg"}]
    rows = read(write(root / "a.jsonl", "\n".join(map(json.dumps, records))), labels="none")
    assert [row["label"] for row in rows] == [None, None]


def test_jsonl_and_parquet_say_the_same_as_csv(root: Path) -> None:
    records = [{"path": "images/1.jpg", "label": 3}, {"path": "./images/deep/3.jpg", "label": 10}]
    write(root / "a.csv", "path,label\nimages/1.jpg,3\n./images/deep/3.jpg,10\n")
    write(root / "a.jsonl", "\n".join(map(json.dumps, records)) + "\n\n")
    pq.write_table(pa.Table.from_pylist(records), root / "a.parquet")
    assert read(root / "a.csv") == read(root / "a.jsonl") == read(root / "a.parquet")
    assert [row["label"] for row in read(root / "a.csv")] == ["3", "10"]


def test_of_a_parquet_list_only_the_columns_that_are_used_are_read(root: Path) -> None:
    columns = {
        "path": ["images/1.jpg", "images/2.jpg"],
        "species": ["cat", "dog"],
        "embedding": [[0.5] * 512] * 2,
    }
    path = root / "a.parquet"
    pq.write_table(pa.table(columns), path, compression="none", use_dictionary=False)
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(2)
    data = bytearray(path.read_bytes())
    # No reader of the column gets past these zeros.
    data[chunk.data_page_offset : chunk.data_page_offset + chunk.total_compressed_size] = bytes(
        chunk.total_compressed_size
    )
    path.write_bytes(data)
    assert [row["label"] for row in read(path, label_column="species")] == ["cat", "dog"]


def test_a_parquet_list_without_a_path_column_tells_all_that_it_has(root: Path) -> None:
    pq.write_table(pa.table({"label": ["cat"], "embedding": [[0.5]]}), root / "a.parquet")
    with pytest.raises(DataError, match="but has only label, embedding"):
        read(root / "a.parquet")
    pq.write_table(pa.table({"path": ["images/1.jpg"], "embedding": [[0.5]]}), root / "a.parquet")
    with pytest.raises(DataError, match="no column 'breed', only path, embedding"):
        read(root / "a.parquet", label_column="breed")


def test_labels_that_became_floats_are_integers_again(root: Path) -> None:
    pq.write_table(pa.table({"path": ["images/1.jpg"], "label": [7.0]}), root / "a.parquet")
    assert read(root / "a.parquet")[0]["label"] == "7"


def test_paths_may_be_absolute_or_start_at_images_root(root: Path) -> None:
    elsewhere = root / "lists"
    elsewhere.mkdir()
    absolute = read(write(elsewhere / "a.csv", f"uri\n{root}/images/1.jpg\nfile://{root}/images/2.jpg\n"))
    relative = read(
        write(elsewhere / "b.csv", "path\n1.jpg\n../images/2.jpg\n"), images_root=str(root / "images")
    )
    assert [row["uri"] for row in absolute] == [row["uri"] for row in relative]
    assert relative[0]["sample_id"] == "1.jpg"


def test_all_bad_rows_are_reported_with_their_lines(root: Path) -> None:
    lines = [
        "path,label,split,id,weight,md5",
        "images/1.jpg,cat,train,a,1,",
        "images/2.jpg,cat,train,a,1,",
        "images/none.jpg,cat,train,c,1,",
        "images/2.jpg,,train,d,1,",
        "images/2.jpg,cat,holdout,e,1,",
        "images/2.jpg,cat,,f,1,",
        "images/2.jpg,cat,train,g,-1,",
        "images/2.jpg,cat,train,h,1,xyz",
        ",cat,train,i,1,",
        "images/2.jpg,cat",
    ]
    with pytest.raises(DataError) as caught:
        read(write(root / "list.csv", "\r\n".join(lines)))
    text = str(caught.value)
    assert "9 rows cannot be used" in text
    for line, problem in [
        (3, "the id 'a' was there before"),
        (4, "none.jpg does not exist"),
        (5, "no label, though"),
        (6, "'holdout' is no split"),
        (7, "no split"),
        (8, "-1.0 is no weight"),
        (9, "32 hex digits"),
        (10, "no path"),
        (11, "2 cells instead of 6"),
    ]:
        assert any(f"line {line}:" in row and problem in row for row in text.splitlines()), (line, problem)


def test_only_the_first_twenty_bad_rows_are_shown(root: Path) -> None:
    text = "path\n" + "".join(f"images/none-{index}.jpg\n" for index in range(30))
    with pytest.raises(DataError, match="and 10 more") as caught:
        read(write(root / "list.csv", text))
    assert caught.value.fields["num_bad_rows"] == 30


def test_bad_jsonl_rows_are_reported_with_their_lines(root: Path) -> None:
    text = '{"path": "images/1.jpg", "label": ["a", "b"]}\n{"path":\n[1]\n{"path": "images/2.jpg", "label": "a"}\n'
    with pytest.raises(DataError) as caught:
        read(write(root / "a.jsonl", text))
    shown = str(caught.value).splitlines()[1:4]
    assert [line.split(":")[0].strip() for line in shown] == ["line 1", "line 2", "line 3"]


def test_a_jsonl_row_nested_too_deeply_is_reported_with_its_line(root: Path) -> None:
    text = '{"path": "images/1.jpg", "label": "a"}\n{"path": ' + "[" * 100_000
    with pytest.raises(DataError, match="line 2: not JSON"):
        read(write(root / "a.jsonl", text))


def test_a_record_without_a_split_is_reported_once_where_another_has_one(root: Path) -> None:
    records = [
        {"path": "images/1.jpg"},
        {"path": "images/2.jpg", "split": "train", "label": "cat"},
        {"path": "images/deep/3.jpg", "label": "cat"},
        {"path": "b,c d.jpg", "split": "test", "label": "dog"},
    ]
    with pytest.raises(DataError, match="2 rows cannot be used") as caught:
        read(write(root / "a.jsonl", "\n".join(map(json.dumps, records))))
    assert caught.value.what.splitlines()[1:] == [
        "  line 1: no label, though other rows have one; no split, though other rows have one",
        "  line 3: no split, though other rows have one",
    ]


def test_a_split_without_labels_is_taken_beside_labelled_ones_and_half_of_one_is_not(root: Path) -> None:
    lines = ["path,label,split", "images/1.jpg,cat,train", "images/2.jpg,,test", "images/deep/3.jpg,,test"]
    rows = read(write(root / "list.csv", "\n".join(lines)))
    assert [(row["label"], row["split"]) for row in rows] == [
        ("cat", "train"),
        (None, "test"),
        (None, "test"),
    ]
    lines[-1] = "images/deep/3.jpg,cat,test"
    with pytest.raises(DataError, match="line 3: no label, though other rows of test have one"):
        read(write(root / "list.csv", "\n".join(lines)))


def test_records_without_any_split_leave_it_open(root: Path) -> None:
    rows = read(write(root / "a.jsonl", '{"path": "images/1.jpg"}\n{"path": "images/2.jpg"}\n'))
    assert [row["split"] for row in rows] == [None, None]


@pytest.mark.parametrize(
    ("name", "text", "line", "problem"),
    [
        ("a.jsonl", '{"path": "images/1.jpg", "split": ["train"]}', 1, "split: a single text or number"),
        ("a.csv", 'path,label\nimages/1.jpg,cat\nimages/2.jpg,"' + "x" * 140_000, 3, "no CSV from here on"),
        (
            "a.csv",
            'path,label\nimages/1.jpg,cat\nimages/2.jpg,"dog\nimages/deep/3.jpg,owl\n',
            3,
            "no CSV from here on",
        ),
        ("a.csv", "path,label,label\nimages/1.jpg,cat,dog\n", 1, "more than one column is called label"),
    ],
)
def test_what_cannot_be_read_is_reported_with_its_line(
    root: Path, name: str, text: str, line: int, problem: str
) -> None:
    with pytest.raises(DataError) as caught:
        read(write(root / name, text))
    (shown,) = [row for row in str(caught.value).splitlines() if row.startswith("  line ")]
    assert shown.startswith(f"  line {line}: ")
    assert problem in shown


def test_spaces_around_the_names_of_columns_do_not_count(root: Path) -> None:
    (row,) = read(write(root / "list.csv", "path, label , split\nimages/1.jpg,cat,val\n"))
    assert (row["label"], row["split"]) == ("cat", "val")


def test_spaces_around_the_cells_of_a_csv_make_no_other_class(root: Path) -> None:
    rows = read(write(root / "list.csv", "path,label\nimages/1.jpg,cat\nimages/2.jpg , cat \n"))
    assert [(row["sample_id"], row["label"]) for row in rows] == [
        ("images/1.jpg", "cat"),
        ("images/2.jpg", "cat"),
    ]


@pytest.mark.parametrize("header", ["a.jpg;cat", "name,label", "path,uri"])
def test_a_list_needs_exactly_one_path_column(root: Path, header: str) -> None:
    with pytest.raises(DataError, match="must have one column of path, uri, file_name"):
        read(write(root / "list.csv", f"{header}\nx,y\n" if "," in header else f"{header}\nx\n"))


def test_the_label_column_can_be_chosen_and_must_exist(root: Path) -> None:
    write(root / "list.csv", "path,species\nimages/1.jpg,cat\n")
    assert read(root / "list.csv", label_column="species")[0]["label"] == "cat"
    with pytest.raises(DataError, match="no column 'breed'"):
        read(root / "list.csv", label_column="breed")


def test_a_list_must_be_utf8(root: Path) -> None:
    (root / "list.csv").write_bytes("path\nä.jpg\n".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        read(root / "list.csv")


def test_the_content_id_follows_a_given_checksum(root: Path) -> None:
    (root / "copy.jpg").write_bytes((root / "images/1.jpg").read_bytes())
    digits = md5((root / "copy.jpg").read_bytes()).hexdigest()
    rows = read(
        write(root / "list.csv", f"path,md5\nimages/1.jpg,{digits}\ncopy.jpg,{digits}\nimages/2.jpg,\n")
    )
    assert rows[0]["content_id"] == rows[1]["content_id"] != rows[2]["content_id"]


def test_objects_far_apart_are_found_without_listing_what_lies_between(root: Path) -> None:
    for index in range(1200):
        write_files(root, f"many/{index:05d}.jpg")
    wanted = {"many/00000.jpg", "many/01199.jpg", "images/deep/3.jpg"}
    groups = _by_folder({*wanted, "gone/1.jpg"})
    assert {info.key for group in groups for info in _find_in_folder(LocalStore(str(root)), group)} == wanted


def test_what_lies_beside_local_files_is_not_looked_at(root: Path) -> None:
    (root / os.fsdecode(b"images/\xe4.jpg")).write_bytes(jpeg_bytes(1))
    rows = read(write(root / "list.csv", "path\nimages/1.jpg\nimages/2.jpg\n"))
    assert [row["uri"] for row in rows] == [f"{root}/images/1.jpg", f"{root}/images/2.jpg"]


def test_local_paths_that_name_no_file_are_reported_with_their_lines(root: Path) -> None:
    os.mkfifo(root / "fifo.jpg")
    (root / "circle.jpg").symlink_to("circle.jpg")
    paths = [
        "images",
        "images/none.jpg",
        "images/1.jpg/2.jpg",
        "fifo.jpg",
        "circle.jpg",
        "x" * 300 + ".jpg",
        "\0.jpg",
    ]
    text = "".join(f"{json.dumps({'path': path})}\n" for path in [*paths, "\ud800.jpg", "images/1.jpg"])
    with pytest.raises(DataError, match="8 rows cannot be used") as caught:
        read(write(root / "a.jsonl", text))
    assert str(caught.value).count("does not exist") == 8
