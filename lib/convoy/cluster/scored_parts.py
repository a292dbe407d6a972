"""What a scoring operator writes of a slice: the parts of an evaluation, or the one part of a scoring."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from convoy.cluster.prepared_batches import SliceImages
from convoy.cluster.scoring_spec import ScoreTable, ScoringSpec
from convoy.cluster.slices import SliceTask
from convoy.storage.commits import PartFile, part_key
from convoy.storage.member_predictions import member_output, write_member_predictions
from convoy.storage.object_store import ObjectStore
from convoy.storage.predictions import PREDICTIONS, predictions_table, write_predictions
from convoy.storage.scores import RowStatus, ScoredRows, scores_table, write_scores


@dataclass(frozen=True, slots=True, eq=False)
class SliceLogits:
    """Joint float32 logits_NK of a slice's rows; logits_MNVK of members and features_ND where they are kept."""

    joint_NK: NDArray[np.float32]
    members_MNVK: NDArray[np.float32] | None = None
    features_ND: NDArray[np.floating] | None = None


def write_parts(
    store: ObjectStore,
    spec: ScoringSpec,
    task: SliceTask,
    images: SliceImages,
    logits: SliceLogits,
    attempt: str,
) -> dict[str, PartFile]:
    """Write the parts of an attempt at a slice, by the ids of their outputs. Rows without an image are left out."""
    samples, usable = images.rows.filter(pa.array(images.usable_N)), _usable(logits, images)
    labels = pa.array(spec.class_of_label, pa.int32()).take(samples["label"].combine_chunks())
    if spec.table is None:
        return _evaluation_parts(store, spec, task, samples, labels, usable, attempt)
    (output,) = task.outputs
    part = write_scores(
        store,
        part_key(spec.outputs[output], task.slice, attempt),
        _score_table(spec, spec.table, samples, labels, images, usable),
        usable.joint_NK,
        model_digest=spec.model_digest,
        run_id=spec.run_id,
        metadata=spec.metadata,
    )
    return {output: part}


def _usable(logits: SliceLogits, images: SliceImages) -> SliceLogits:
    usable_N = images.usable_N
    members_MNVK, features_ND = logits.members_MNVK, logits.features_ND
    return SliceLogits(
        joint_NK=logits.joint_NK[usable_N],
        members_MNVK=None if members_MNVK is None else members_MNVK[:, usable_N],
        features_ND=None if features_ND is None else features_ND[usable_N],
    )


def _evaluation_parts(
    store: ObjectStore,
    spec: ScoringSpec,
    task: SliceTask,
    samples: pa.Table,
    labels: pa.Array,
    logits: SliceLogits,
    attempt: str,
) -> dict[str, PartFile]:
    """The joint predictions, and what is kept of each member."""
    table = predictions_table(
        samples,
        labels=labels,
        logits_BK=logits.joint_NK,
        scores_BK=_scores(spec, logits),
        classes=spec.classes,
    )
    key = part_key(spec.outputs[PREDICTIONS], task.slice, attempt)
    names = {"model_digest": spec.model_digest, "run_id": spec.run_id}
    parts = {PREDICTIONS: write_predictions(store, key, table, **names, metadata=spec.metadata)}
    for member, logits_NVK in enumerate(() if logits.members_MNVK is None else logits.members_MNVK):
        output = member_output(member)
        parts[output] = write_member_predictions(
            store,
            part_key(spec.outputs[output], task.slice, attempt),
            samples,
            labels=labels,
            logits_NVK=logits_NVK,
            metadata={**spec.metadata, "convoy.member_digest": spec.members[member].digest},
        )
    return parts


def _score_table(
    spec: ScoringSpec,
    table: ScoreTable,
    samples: pa.Table,
    labels: pa.Array,
    images: SliceImages,
    logits: SliceLogits,
) -> pa.Table:
    names = pa.array(table.label_names, pa.string())
    statuses = [
        RowStatus.CONVERTED if row in images.converted else RowStatus.OK
        for row in np.flatnonzero(images.usable_N)
    ]
    rows = ScoredRows(
        samples=samples,
        labels=labels,
        label_names=names.take(samples["label"].combine_chunks()),
        statuses=statuses,
        logits_NK=logits.joint_NK,
        scores_NK=_scores(spec, logits),
        features_ND=logits.features_ND,
        classes=spec.classes,
    )
    return scores_table(rows, outputs=table.outputs, partition_by=table.partition_by)


def _scores(spec: ScoringSpec, logits: SliceLogits) -> NDArray[np.float32]:
    """What ranks classes: probabilities, or the logits of heads that are no probability models."""
    if not spec.gives_probabilities:
        return logits.joint_NK
    probabilities_NK: NDArray[np.float32] = torch.softmax(torch.from_numpy(logits.joint_NK), dim=1).numpy()
    return probabilities_NK
