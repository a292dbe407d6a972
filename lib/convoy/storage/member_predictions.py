"""What each member of a committee says of each sample: one part a slice and member, one row a sample.

From these rows ensembles are chosen, weighted and calibrated without running a network again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from convoy.core.errors import DataError
from convoy.core.fingerprints import rows_digest
from convoy.core.large_arrays import large_array
from convoy.storage.commits import PartFile, RunManifest
from convoy.storage.object_store import ObjectStore
from convoy.storage.parts import write_table
from convoy.storage.predictions import list_offsets

MEMBER_PREDICTIONS_SCHEMA_VERSION = 1
_MEMBER = "member_"

# Logits of the committee's classes, a list for each view in the order of the crop plan; where views were not kept,
# one list: the mean over the views by the averaging rule, at the member's temperature.
MEMBER_PREDICTIONS_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        # Index into the committee's classes; null for unlabelled samples.
        pa.field("label", pa.int32()),
        pa.field("logits", pa.list_(pa.list_(pa.float32())), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MemberLogits:
    """Predictions of M members for N labelled samples in V views of K classes, in the order of the run's slices."""

    sample_ids: Sequence[str]
    labels_N: NDArray[np.int32]
    logits_MVNK: NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MemberPart:
    """One member's predictions for the N labelled samples of a slice."""

    member: int
    sample_ids: pa.ChunkedArray
    labels_N: NDArray[np.int32]
    logits_VNK: NDArray[np.float32]


def member_output(member: int) -> str:
    """The id of the output that holds a member's predictions."""
    return f"{_MEMBER}{member:02d}"


def write_member_predictions(
    store: ObjectStore,
    key: str,
    samples: pa.Table,
    *,
    labels: pa.Array,
    logits_NVK: NDArray[np.float32],
    metadata: Mapping[str, str],
) -> PartFile:
    """Write one member's part of a slice, for samples in the order of the logits, and return what proves it."""
    table = pa.table(
        {"sample_id": samples["sample_id"], "label": labels, "logits": _nested_lists(logits_NVK)},
        schema=MEMBER_PREDICTIONS_SCHEMA,
    )
    digest = rows_digest(samples["sample_id"].to_pylist(), logits_NVK)
    version = {"convoy.schema_version": str(MEMBER_PREDICTIONS_SCHEMA_VERSION)}
    return write_table(store, key, table, {**metadata, **version}, digest)


def iter_member_parts(store: ObjectStore, manifest: RunManifest) -> Iterator[MemberPart]:
    """What a run predicts of labelled samples, slice by slice, of each member by member; parts without are left out.

    Raises DataError for a run that kept none.
    """
    members = _kept_members(manifest)
    for record in manifest.slices:
        for member in members:
            table = store.open_parquet(record.parts[member_output(member)].key).read()
            table = table.filter(pc.is_valid(table["label"]))
            if table.num_rows:
                yield MemberPart(
                    member=member,
                    sample_ids=table["sample_id"],
                    labels_N=table["label"].to_numpy(),
                    logits_VNK=_nested_array(table["logits"]).transpose(1, 0, 2),
                )


def read_member_logits(store: ObjectStore, manifest: RunManifest) -> MemberLogits:
    """What all members of a run predict of labelled samples, in memory or on disk (`core.large_arrays`).

    They take 4 bytes a member, view, sample and class. Raises DataError for a run that kept none, StorageFull where
    there is no room for them.
    """
    place_of = {member: place for place, member in enumerate(_kept_members(manifest))}
    most_rows = sum(record.parts[member_output(next(iter(place_of)))].num_rows for record in manifest.slices)
    ids: list[str] = []
    labels: list[NDArray[np.int32]] = []
    logits_MVNK: NDArray[np.float32] | None = None
    for part in iter_member_parts(store, manifest):
        num_views, num_rows, num_classes = part.logits_VNK.shape
        if logits_MVNK is None:
            logits_MVNK = large_array((len(place_of), num_views, most_rows, num_classes), np.float32)
        if place_of[part.member] == 0:
            ids += part.sample_ids.to_pylist()
            labels.append(part.labels_N)
        logits_MVNK[place_of[part.member], :, len(ids) - num_rows : len(ids)] = part.logits_VNK
    if logits_MVNK is None:
        raise DataError("the run has no labelled sample with predictions", where=f"runs/{manifest.run_id}")
    return MemberLogits(
        sample_ids=ids, labels_N=np.concatenate(labels), logits_MVNK=logits_MVNK[:, :, : len(ids)]
    )


def _kept_members(manifest: RunManifest) -> list[int]:
    members = {
        int(output.removeprefix(_MEMBER))
        for record in manifest.slices
        for output in record.parts
        if output.startswith(_MEMBER)
    }
    if not members:
        raise DataError(
            "the run did not keep its members' predictions",
            where=f"runs/{manifest.run_id}",
            next_step="run it again with --set keep=views",
        )
    return sorted(members)


def _nested_lists(logits_NVK: NDArray[np.float32]) -> pa.ListArray:
    num_rows, num_views, num_classes = logits_NVK.shape
    values = pa.array(np.ascontiguousarray(logits_NVK).reshape(-1), pa.float32())
    views = pa.ListArray.from_arrays(list_offsets(num_rows * num_views, num_classes), values)
    return pa.ListArray.from_arrays(list_offsets(num_rows, num_views), views)


def _nested_array(column: pa.ChunkedArray) -> NDArray[np.float32]:
    """The array logits_NVK of a column of lists of lists that all have the same lengths."""
    rows = column.combine_chunks()
    views = rows.flatten()
    num_views = len(views) // len(rows)
    values: NDArray[np.float32] = views.flatten().to_numpy()
    return values.reshape(len(rows), num_views, -1)
