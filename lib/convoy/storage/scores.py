"""Parts of scores: the public parquet contract of `convoy score`, one row a sample that could be scored.

Rows that could not be are in the reject table, under the same ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from convoy.core.errors import ConfigError
from convoy.core.fingerprints import rows_digest
from convoy.core.result_columns import ClassOutputs, PartitionBy
from convoy.storage.commits import PartFile
from convoy.storage.object_store import ObjectStore
from convoy.storage.parts import write_table
from convoy.storage.predictions import PREDICTIONS, float_lists, ranking_table

SCORES_SCHEMA_VERSION = 1
# What Hive, Spark and DuckDB call the folder of rows that have no value.
_NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"
_LABEL_FOLDER = "label_name="
_LABEL_PARTITION = f"{PREDICTIONS}/{_LABEL_FOLDER}"
# What Hive escapes in names of folders, and no more: Hive and Spark read each code as a character, so the bytes of ä,
# encoded as in a URL, would be two.
_ESCAPES = {ord(char): f"%{ord(char):02X}" for char in [*map(chr, range(32)), *"\"#%'*/:=?\\\x7f{[]^"]}
# Of a file or folder, on any usual disk.
_LONGEST_NAME_BYTES = 255


class RowStatus(StrEnum):
    """Whether an image was used as it is, or had to be converted: turned upright, made RGB, cut to a frame."""

    OK = "ok"
    CONVERTED = "converted"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScoredRows:
    """What a committee says of some samples. `scores_NK` are what ranks classes: probabilities, or margins.

    `labels` are indices into `classes`, null where a sample has no label or one that the model does not know;
    `label_names` are those of the dataset.
    """

    samples: pa.Table
    labels: pa.Array
    label_names: pa.Array
    statuses: Sequence[RowStatus]
    logits_NK: NDArray[np.float32]
    scores_NK: NDArray[np.float32]
    features_ND: NDArray[np.floating] | None
    classes: Sequence[str]


def scores_table(rows: ScoredRows, *, outputs: ClassOutputs, partition_by: PartitionBy) -> pa.Table:
    """The columns of a part, but for model and run; one by which files are partitioned is in their path only."""
    table = ranking_table(
        rows.samples,
        labels=rows.labels,
        logits_BK=rows.logits_NK,
        scores_BK=rows.scores_NK,
        classes=rows.classes,
    )
    if partition_by is not PartitionBy.LABEL:
        table = table.append_column("label_name", rows.label_names)
    # The type is said here too: without it a slice without a usable row would have a column of nulls.
    statuses = pa.array([status.value for status in rows.statuses], pa.string())
    table = table.append_column(pa.field("status", pa.string(), nullable=False), statuses)
    if outputs is not ClassOutputs.NONE:
        values_NK = rows.logits_NK if outputs is ClassOutputs.LOGITS else rows.scores_NK
        table = table.append_column(outputs.value, float_lists(values_NK))
    if rows.features_ND is not None:
        width = rows.features_ND.shape[1]
        values = pa.array(np.ascontiguousarray(rows.features_ND).reshape(-1))
        table = table.append_column("features", pa.FixedSizeListArray.from_arrays(values, width))
    return table


def write_scores(
    store: ObjectStore,
    key: str,
    table: pa.Table,
    logits_NK: NDArray[np.float32],
    *,
    model_digest: str,
    run_id: str,
    metadata: Mapping[str, str],
) -> PartFile:
    """Write one part and return what proves it. The digest is of ids and logits, whether these are kept or not."""
    for name, value in (("model_digest", model_digest), ("run_id", run_id)):
        field = pa.field(name, pa.string(), nullable=False)
        table = table.append_column(field, pa.repeat(value, table.num_rows))
    digest = rows_digest(table["sample_id"].to_pylist(), logits_NK)
    version = {"convoy.schema_version": str(SCORES_SCHEMA_VERSION)}
    return write_table(store, key, table, {**metadata, **version}, digest)


def partitioned(
    batches: Iterable[pa.RecordBatch | pa.Table], by: PartitionBy, classes: Sequence[str]
) -> Iterator[tuple[tuple[str, ...], pa.Table]]:
    """Rows of a manifest by the output that they go into: `predictions`, or `predictions/<column>=<value>`."""
    for batch in batches:
        table = pa.Table.from_batches([batch]) if isinstance(batch, pa.RecordBatch) else batch
        if by is PartitionBy.NONE:
            yield (PREDICTIONS,), table
            continue
        column = "split" if by is PartitionBy.SPLIT else "label"
        for value, rows in _rows_by_value(table, column):
            yield (_partition(by, value, classes),), rows


def _rows_by_value(table: pa.Table, column: str) -> list[tuple[Any, pa.Table]]:
    """The rows of each value in their order, values in order, null last; sorted once, as classes may be thousands."""
    encoded = table[column].combine_chunks().dictionary_encode(null_encoding="encode")
    order_N = np.argsort(encoded.indices.to_numpy(), kind="stable")
    sizes_V = np.bincount(encoded.indices.to_numpy(), minlength=len(encoded.dictionary))
    ordered, ends_V = table.take(pa.array(order_N)), np.cumsum(sizes_V)
    found = [
        (value, ordered.slice(end - size, size))
        for value, end, size in zip(encoded.dictionary.to_pylist(), ends_V, sizes_V, strict=True)
    ]
    return sorted(found, key=lambda one: (one[0] is None, one[0]))


def _partition(by: PartitionBy, value: str | int | None, classes: Sequence[str]) -> str:
    if by is PartitionBy.SPLIT:
        return f"{PREDICTIONS}/split={value}"
    return f"{PREDICTIONS}/{_label_folder(None if value is None else classes[int(value)])}"


def _label_folder(label: str | None) -> str:
    # As Hive writes it: a class may be called a/b, or x=y.
    return _LABEL_FOLDER + (_NULL_PARTITION if label is None else label.translate(_ESCAPES))


def require_short_labels(classes: Iterable[str]) -> None:
    """Raise ConfigError unless the folder of every class has a name that a disk can hold."""
    for label in classes:
        if len(_label_folder(label).encode()) > _LONGEST_NAME_BYTES:
            raise ConfigError(
                f"the folder of class '{label[:40]}…' would have a name of more than {_LONGEST_NAME_BYTES} bytes",
                where="partition_by: label",
                next_step="use partition_by: none, where label_name is a column, or give the class a shorter name",
            )


def label_of_partition(output: str) -> str | None:
    """The name of the label of all rows of an output; None where they have none, or files do not lie by label.

    Runs of earlier versions percent-encoded more of it, as in a URL.
    """
    name = output.removeprefix(_LABEL_PARTITION)
    return None if name in (output, _NULL_PARTITION) else unquote(name)
