"""Prediction parts: one row a sample, in columns that DuckDB, Polars, pandas and Spark read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from convoy.core.errors import ConfigError
from convoy.core.fingerprints import rows_digest
from convoy.core.metrics import TOP_K
from convoy.storage.commits import PartFile, RunManifest
from convoy.storage.object_store import ObjectStore
from convoy.storage.parts import write_table

# The id of this output among those of a run.
PREDICTIONS = "predictions"
PREDICTIONS_SCHEMA_VERSION = 1
_MAX_LIST_VALUES = 2**31 - 1

PREDICTIONS_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("etag", pa.string(), nullable=False),
        # Index into the model's classes; null for unlabelled samples.
        pa.field("label", pa.int32()),
        pa.field("pred", pa.int32(), nullable=False),
        pa.field("pred_name", pa.string(), nullable=False),
        # Softmax probability of `pred`, or its margin for heads that are no probability models.
        pa.field("score", pa.float32(), nullable=False),
        pa.field("topk_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("topk_scores", pa.list_(pa.float32()), nullable=False),
        pa.field("logits", pa.list_(pa.float32()), nullable=False),
        pa.field("model_digest", pa.string(), nullable=False),
        pa.field("run_id", pa.string(), nullable=False),
    ]
)


def predictions_table(
    samples: pa.Table,
    *,
    labels: pa.Array,
    logits_BK: np.ndarray,
    scores_BK: np.ndarray,
    classes: Sequence[str],
) -> pa.Table:
    """The prediction columns, but for model and run, of samples in the same order as the logits."""
    ranking = ranking_table(samples, labels=labels, logits_BK=logits_BK, scores_BK=scores_BK, classes=classes)
    return ranking.append_column(PREDICTIONS_SCHEMA.field("logits"), float_lists(logits_BK))


def ranking_table(
    samples: pa.Table,
    *,
    labels: pa.Array,
    logits_BK: np.ndarray,
    scores_BK: np.ndarray,
    classes: Sequence[str],
) -> pa.Table:
    """The same without the logits: what is predicted of each sample, and the best TOP_K classes."""
    num_top = min(TOP_K, len(classes))
    # A stable sort of the negated scores ranks equal scores by class index, as the metrics do.
    top_BK = np.argsort(-logits_BK, axis=1, kind="stable")[:, :num_top].astype(np.int32)
    top_scores_BK = np.take_along_axis(scores_BK, top_BK, axis=1).astype(np.float32)
    names = pa.array(list(classes), pa.string())
    columns = {
        "sample_id": samples["sample_id"],
        "uri": samples["uri"],
        "etag": samples["etag"],
        "label": labels,
        "pred": pa.array(top_BK[:, 0]),
        "pred_name": names.take(pa.array(top_BK[:, 0])),
        "score": pa.array(top_scores_BK[:, 0]),
        "topk_ids": _lists(top_BK, pa.int32()),
        "topk_scores": float_lists(top_scores_BK),
    }
    return pa.table(columns, schema=pa.schema([PREDICTIONS_SCHEMA.field(name) for name in columns]))


def write_predictions(
    store: ObjectStore,
    key: str,
    table: pa.Table,
    *,
    model_digest: str,
    run_id: str,
    metadata: Mapping[str, str],
) -> PartFile:
    """Write one part of predictions and return what proves it."""
    for name, value in (("model_digest", model_digest), ("run_id", run_id)):
        table = table.append_column(name, pa.repeat(value, table.num_rows))
    digest = rows_digest(table["sample_id"].to_pylist(), list_array(table["logits"]))
    return write_table(store, key, table.cast(PREDICTIONS_SCHEMA), metadata, digest)


def read_labelled(store: ObjectStore, manifest: RunManifest, columns: Sequence[str]) -> Iterator[pa.Table]:
    """The predictions of the labelled samples of a run, a part at a time; parts without any are left out."""
    for record in manifest.slices:
        table = store.open_parquet(record.parts[PREDICTIONS].key).read(columns=list(columns))
        labelled = table.filter(pc.is_valid(table["label"]))
        if labelled.num_rows:
            yield labelled


def read_predicted(store: ObjectStore, manifest: RunManifest, column: str) -> pa.Table:
    """`sample_id` and one more column of all predictions of a run, of all of its partitions, in memory."""
    keys = [
        part.key
        for record in manifest.slices
        for output, part in record.parts.items()
        if output.startswith(PREDICTIONS)
    ]
    # Large strings: the texts of all rows may be more than 2 GiB.
    types = {name: PREDICTIONS_SCHEMA.field(name).type for name in ("sample_id", column)}
    schema = pa.schema({name: pa.large_string() if of == pa.string() else of for name, of in types.items()})
    tables = [store.open_parquet(key).read(columns=schema.names).cast(schema) for key in keys]
    return pa.concat_tables([schema.empty_table(), *tables])


def paired(first: pa.Table, second: pa.Table) -> tuple[pa.Table, pa.Table]:
    """The rows of two tables whose `sample_id` is in both, in the order of the first."""
    places = pc.index_in(first["sample_id"], value_set=second["sample_id"].combine_chunks())
    return first.filter(places.is_valid()), second.take(places.drop_null())


def list_array(column: pa.ChunkedArray) -> np.ndarray:
    """The (rows, length) array of a column of lists that all have one length."""
    values = column.combine_chunks()
    flat: np.ndarray = values.flatten().to_numpy()
    return flat.reshape(len(values), -1) if len(values) else np.empty((0, 0), flat.dtype)


def float_lists(values_BK: np.ndarray) -> pa.ListArray:
    """The rows of an array as lists of float32."""
    return _lists(values_BK.astype(np.float32), pa.float32())


def _lists(values_BK: np.ndarray, value_type: pa.DataType) -> pa.ListArray:
    offsets = list_offsets(*values_BK.shape)
    return pa.ListArray.from_arrays(offsets, pa.array(values_BK.reshape(-1), value_type))


def list_offsets(num_lists: int, length: int) -> pa.Array:
    """Where lists of one length begin among their values, and where the last one ends, as int32.

    Raises ConfigError for more values than the offsets of a column of lists can count.
    """
    num_values = num_lists * length
    if num_values > _MAX_LIST_VALUES:
        raise ConfigError(
            f"{num_values} outputs of a slice are more than the {_MAX_LIST_VALUES} that a column of lists can hold",
            where="extraction.slice_rows",
            next_step="make extraction.slice_rows smaller, and start afresh with --new-run",
        )
    return pa.array(np.arange(num_lists + 1, dtype=np.int64) * length, pa.int32())
