"""The rows of `convoy score`: what is in a part, who can read it, and in which folder it lies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset as pads
import pytest

from convoy.core.errors import ConfigError
from convoy.core.result_columns import ClassOutputs, PartitionBy
from convoy.storage.commits import PartFile, part_key
from convoy.storage.local_store import LocalStore
from convoy.storage.manifests import MANIFEST_SCHEMA
from convoy.storage.scores import (
    RowStatus,
    ScoredRows,
    label_of_partition,
    partitioned,
    require_short_labels,
    scores_table,
    write_scores,
)

MODEL_CLASSES = ("cat", "dog", "a/b")
LOGITS_NK = np.array([[2, 0, 0], [0, 0, 3], [0, 1, 0]], np.float32)
PROBABILITIES_NK = np.exp(LOGITS_NK) / np.exp(LOGITS_NK).sum(axis=1, keepdims=True)
FEATURES_ND = np.arange(6, dtype=np.float16).reshape(3, 2)


def manifest_rows(labels: list[int | None], splits: list[str]) -> pa.Table:
    count = len(labels)
    columns: dict[str, Any] = {
        "sample_id": [f"s{index}" for index in range(count)],
        "uri": [f"/images/s{index}" for index in range(count)],
        "etag": ["v1"] * count,
        "content_id": [bytes([index]) * 16 for index in range(count)],
        "label": labels,
        "split": splits,
        "weight": [1.0] * count,
    }
    return pa.Table.from_pylist(
        [{name: values[index] for name, values in columns.items()} for index in range(count)], MANIFEST_SCHEMA
    )


def scored_rows(features_ND: np.ndarray | None = None) -> ScoredRows:
    samples = manifest_rows([0, None, 1], ["train", "val", "val"])
    return ScoredRows(
        samples=samples,
        labels=pa.array([0, None, None], pa.int32()),
        label_names=pa.array(["cat", None, "horse"], pa.string()),
        statuses=[RowStatus.OK, RowStatus.CONVERTED, RowStatus.OK],
        logits_NK=LOGITS_NK,
        scores_NK=PROBABILITIES_NK,
        features_ND=features_ND,
        classes=MODEL_CLASSES,
    )


def write(
    store: LocalStore, *, outputs: ClassOutputs = ClassOutputs.NONE, features_ND: np.ndarray | None = None
) -> PartFile:
    table = scores_table(scored_rows(features_ND), outputs=outputs, partition_by=PartitionBy.NONE)
    key = part_key("predictions/", "0-000000", "a0")
    return write_scores(
        store, key, table, LOGITS_NK, model_digest="m1", run_id="r1", metadata={"convoy.run_id": "r1"}
    )


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path))


def test_a_row_says_what_is_predicted_of_a_sample_and_who_says_so(store: LocalStore) -> None:
    rows = store.open_parquet(write(store).key).read().to_pylist()
    first = rows[0]
    assert first["score"] == pytest.approx(PROBABILITIES_NK[0, 0])
    assert first["topk_scores"] == pytest.approx(sorted(PROBABILITIES_NK[0], reverse=True))
    del first["score"], first["topk_scores"]
    assert first == {
        "sample_id": "s0",
        "uri": "/images/s0",
        "etag": "v1",
        "label": 0,
        "pred": 0,
        "pred_name": "cat",
        "topk_ids": [0, 1, 2],
        "label_name": "cat",
        "status": "ok",
        "model_digest": "m1",
        "run_id": "r1",
    }
    # A label that the model does not know keeps its name; a missing one is null.
    assert [(row["label"], row["label_name"]) for row in rows] == [(0, "cat"), (None, None), (None, "horse")]
    assert [row["status"] for row in rows] == ["ok", "converted", "ok"]


def test_the_digest_of_a_part_does_not_depend_on_which_columns_are_kept(store: LocalStore) -> None:
    digests = {write(store, outputs=outputs).rows_digest for outputs in ClassOutputs}
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("outputs", "expected_NK"),
    [(ClassOutputs.LOGITS, LOGITS_NK), (ClassOutputs.PROBABILITIES, PROBABILITIES_NK)],
)
def test_all_classes_are_kept_on_request(
    store: LocalStore, outputs: ClassOutputs, expected_NK: np.ndarray
) -> None:
    table = store.open_parquet(write(store, outputs=outputs).key).read()
    assert not {"logits", "probabilities"} - {outputs.value} & set(table.column_names)
    assert np.allclose(np.array(table[outputs.value].to_pylist()), expected_NK)


@pytest.mark.parametrize("partition_by", PartitionBy)
@pytest.mark.parametrize("features_ND", [None, FEATURES_ND], ids=["alone", "with_features"])
@pytest.mark.parametrize("outputs", ClassOutputs)
def test_a_slice_without_a_usable_row_is_a_part_of_the_same_columns(
    store: LocalStore, outputs: ClassOutputs, features_ND: np.ndarray | None, partition_by: PartitionBy
) -> None:
    rows = scored_rows(features_ND)
    nothing = ScoredRows(
        samples=rows.samples.slice(0, 0),
        labels=rows.labels.slice(0, 0),
        label_names=rows.label_names.slice(0, 0),
        statuses=[],
        logits_NK=LOGITS_NK[:0],
        scores_NK=PROBABILITIES_NK[:0],
        features_ND=None if features_ND is None else features_ND[:0],
        classes=MODEL_CLASSES,
    )
    full, empty = (
        write_scores(
            store,
            part_key("predictions/", name, "a0"),
            scores_table(some, outputs=outputs, partition_by=partition_by),
            some.logits_NK,
            model_digest="m1",
            run_id="r1",
            metadata={},
        )
        for name, some in (("0-000000", rows), ("0-000001", nothing))
    )
    assert empty.num_rows == 0
    schemas = [store.open_parquet(part.key).schema_arrow for part in (full, empty)]
    assert schemas[0].equals(schemas[1])


def test_duckdb_reads_scores(store: LocalStore, tmp_path: Path) -> None:
    write(store, outputs=ClassOutputs.PROBABILITIES, features_ND=FEATURES_ND)
    query = f"""
        SELECT pred_name, count(*), max(probabilities[3]), max(features[2])
        FROM '{tmp_path}/predictions/*.parquet' GROUP BY pred_name ORDER BY pred_name
    """
    rows = duckdb.sql(query).fetchall()
    assert [(name, count, feature) for name, count, _, feature in rows] == [
        ("a/b", 1, 3),
        ("cat", 1, 1),
        ("dog", 1, 5),
    ]
    assert rows[0][2] == pytest.approx(PROBABILITIES_NK[1, 2])


def test_polars_reads_scores(store: LocalStore, tmp_path: Path) -> None:
    write(store, features_ND=FEATURES_ND)
    table = pl.read_parquet(f"{tmp_path}/predictions/*.parquet").sort("sample_id")
    assert table["topk_ids"].to_list() == [[0, 1, 2], [2, 0, 1], [1, 0, 2]]
    assert table["features"].to_list() == FEATURES_ND.tolist()


def test_pandas_reads_scores(store: LocalStore, tmp_path: Path) -> None:
    write(store, features_ND=FEATURES_ND)
    frame = pd.read_parquet(tmp_path / "predictions").sort_values("sample_id")
    assert frame["pred_name"].tolist() == ["cat", "a/b", "dog"]
    assert np.array_equal(np.stack(frame["features"]), FEATURES_ND)


def test_partitions_are_folders_as_hive_names_them(store: LocalStore, tmp_path: Path) -> None:
    rows = manifest_rows([0, None, 2, 2], ["train", "val", "val", "train"])
    groups = dict(partitioned([rows], PartitionBy.LABEL, MODEL_CLASSES))
    folders = {output: table["sample_id"].to_pylist() for (output,), table in groups.items()}
    assert folders == {
        "predictions/label_name=cat": ["s0"],
        "predictions/label_name=a%2Fb": ["s2", "s3"],
        "predictions/label_name=__HIVE_DEFAULT_PARTITION__": ["s1"],
    }
    table = scores_table(scored_rows(), outputs=ClassOutputs.NONE, partition_by=PartitionBy.LABEL)
    assert "label_name" not in table.column_names
    for output in folders:
        key = part_key(f"{output}/", "0-000000", "a0")
        write_scores(store, key, table, LOGITS_NK, model_digest="m1", run_id="r1", metadata={})
    dataset = pads.dataset(tmp_path / "predictions", partitioning=pads.partitioning(flavor="hive"))
    assert set(dataset.to_table()["label_name"].to_pylist()) == {"cat", "a/b", None}
    files = f"read_parquet('{tmp_path}/predictions/*/*.parquet', hive_partitioning = true)"
    query = f"SELECT DISTINCT label_name FROM {files}"
    assert {name for (name,) in duckdb.sql(query).fetchall()} == {"cat", "a/b", None}


@pytest.mark.parametrize(
    ("label", "folder"),
    [
        ("Käfer", "Käfer"),
        ("red fox+2", "red fox+2"),
        ("50%", "50%25"),
        ("a=b:{c}\t", "a%3Db%3A%7Bc}%09"),
        ("長毛" * 20, "長毛" * 20),
    ],
)
def test_names_of_folders_have_codes_where_hive_writes_them_and_nowhere_else(
    store: LocalStore, tmp_path: Path, label: str, folder: str
) -> None:
    ((output,), _), *_ = partitioned([manifest_rows([0], ["train"])], PartitionBy.LABEL, [label])
    assert output == f"predictions/label_name={folder}"
    assert label_of_partition(output) == label
    table = scores_table(scored_rows(), outputs=ClassOutputs.NONE, partition_by=PartitionBy.LABEL)
    key = part_key(f"{output}/", "0-000000", "a0")
    write_scores(store, key, table, LOGITS_NK, model_digest="m1", run_id="r1", metadata={})
    files = f"read_parquet('{tmp_path}/predictions/*/*.parquet', hive_partitioning = true)"
    assert set(duckdb.sql(f"SELECT label_name FROM {files}").fetchall()) == {(label,)}
    for found in (
        pads.dataset(tmp_path / "predictions", partitioning="hive").to_table()["label_name"].to_pylist(),
        pl.scan_parquet(tmp_path / "predictions", hive_partitioning=True).collect()["label_name"].to_list(),
    ):
        assert set(found) == {label}


def test_folders_of_earlier_runs_have_their_label() -> None:
    assert label_of_partition("predictions/label_name=K%C3%A4fer%2Fred%20fox") == "Käfer/red fox"


def test_a_class_whose_folder_no_disk_could_hold_is_refused() -> None:
    require_short_labels(["猫" * 81, "cat"])
    with pytest.raises(ConfigError, match="more than 255 bytes"):
        require_short_labels(["cat", "猫" * 82])


def test_rows_by_split_keep_their_order() -> None:
    rows = manifest_rows([0, 0, 0, 0], ["val", "train", "val", "train"])
    groups = partitioned([rows], PartitionBy.SPLIT, MODEL_CLASSES)
    assert {output: table["sample_id"].to_pylist() for (output,), table in groups} == {
        "predictions/split=train": ["s1", "s3"],
        "predictions/split=val": ["s0", "s2"],
    }
