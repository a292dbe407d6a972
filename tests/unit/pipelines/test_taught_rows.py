from __future__ import annotations

import pyarrow as pa

from convoy.pipelines.distillation import TaughtRows


def test_rows_count_by_the_weight_of_their_class_beside_their_own() -> None:
    chunks = [([1, 0], [1.0, 2.0]), ([1], [3.0])]
    rows = pa.concat_tables(
        pa.table({"label": pa.array(labels, pa.int32()), "weight": pa.array(weights, pa.float32())})
        for labels, weights in chunks
    )
    taught = TaughtRows(rows=rows, notes=("kept",))
    balanced = taught.weighted_by_class((1.5, 0.5))
    assert balanced.rows["weight"].to_pylist() == [0.5, 3.0, 1.5]
    assert balanced.rows.schema == rows.schema
    assert balanced.notes == ("kept",)
    assert taught.rows["weight"].to_pylist() == [1.0, 2.0, 3.0]
