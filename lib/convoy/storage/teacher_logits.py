"""What a teacher says of the rows of a training: one file beside the frozen rows, in their order."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from convoy.storage.feature_reading import features_array
from convoy.storage.object_store import ObjectStore


def write_teacher_logits(
    store: ObjectStore, key: str, sample_ids: Sequence[str], logits_NK: NDArray[np.float16]
) -> None:
    """Write the logits of the rows with these ids: columns `sample_id`, and `logits` of a fixed length."""
    num_classes = logits_NK.shape[1]
    values = pa.array(np.ascontiguousarray(logits_NK).reshape(-1), pa.float16())
    table = pa.table(
        {
            "sample_id": pa.array(sample_ids, pa.string()),
            "logits": pa.FixedSizeListArray.from_arrays(values, num_classes),
        }
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", use_dictionary=False)
    store.put(key, buffer.getvalue())


def read_teacher_logits(store: ObjectStore, key: str) -> NDArray[np.float16]:
    """The logits_NK in the order in which they were written: 2 bytes a row and class."""
    logits_NK = features_array(store.open_parquet(key).read(columns=["logits"])["logits"])
    # As torch wants it: what Arrow reads cannot be written to.
    return np.require(logits_NK, np.float16, ["C", "W"])
