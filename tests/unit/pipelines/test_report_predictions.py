"""What a page counts of predictions."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from convoy.pipelines.report_predictions import _Found, _tables
from convoy.storage.commits import PartFile, SliceRecord
from convoy.storage.local_store import LocalStore
from convoy.storage.runs import RunFolder
from convoy.vision.decode_rule import DecodeRule

LABELS = ["cat"] * 4 + ["truck"] * 6 + [None]


def predictions() -> pa.Table:
    """All rows taken for cats, by a model that knows no truck."""
    num_rows = len(LABELS)
    return pa.table(
        {
            "sample_id": [f"s{row}" for row in range(num_rows)],
            "uri": ["u"] * num_rows,
            "label": pa.array([0 if label == "cat" else None for label in LABELS], pa.int32()),
            "label_name": LABELS,
            "pred": pa.array([0] * num_rows, pa.int32()),
            "pred_name": ["cat"] * num_rows,
            "score": pa.array([0.9] * num_rows, pa.float32()),
            "topk_ids": [[0]] * num_rows,
            "topk_scores": [[0.9]] * num_rows,
        }
    )


def test_rows_with_a_label_that_the_model_does_not_know_are_counted_apart() -> None:
    found = _Found(names={}, are_probabilities=True)
    found.add(predictions(), "0-000000")
    assert (found.rows, found.labelled, found.right, found.unknown) == (11, 4, 4, 6)


@pytest.mark.parametrize("are_probabilities", [True, False])
def test_margins_that_happen_to_lie_within_0_and_1_are_drawn_as_no_probabilities(
    tmp_path: Path, are_probabilities: bool
) -> None:
    found = _Found(names={}, are_probabilities=are_probabilities)
    found.add(predictions(), "0-000000")
    found.wrong, found.unsure = [], []
    summary = found.summary(RunFolder(LocalStore(str(tmp_path)), "run"), DecodeRule())
    assert (summary.scores is not None, summary.reliability is not None) == (are_probabilities,) * 2


@pytest.mark.parametrize(
    ("folder", "label"),
    [("label_name=pick-up%2Ftruck", "pick-up/truck"), ("label_name=__HIVE_DEFAULT_PARTITION__", None)],
)
def test_files_in_folders_by_label_have_that_label(tmp_path: Path, folder: str, label: str | None) -> None:
    output = f"predictions/{folder}"
    unknown = predictions().filter(pa.array([name != "cat" for name in LABELS])).drop_columns(["label_name"])
    pq.write_table(unknown, tmp_path / "part.parquet")
    part = PartFile.model_construct(key="part.parquet")
    record = SliceRecord.model_construct(parts={output: part})
    (table,) = _tables(LocalStore(str(tmp_path)), record)
    found = _Found(names={}, are_probabilities=True)
    found.add(table, "0-000000")
    assert found.unknown == (0 if label is None else 7)
    assert {row.get("label_name") for row in found.unsure} == {label}
