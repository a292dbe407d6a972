"""Near duplicates among the samples of a dataset: one picture twice, across splits, or under two labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field

from convoy.core.config import StrictModel
from convoy.core.embedding import NEAR_DUPLICATE_THRESHOLD, DuplicateGroup, find_near_duplicates
from convoy.vision.stages import DepthAxis, Stage, StageKind

_NUM_EXAMPLES, _NUM_NAMED = 20, 20
_NUM_TAPS = 3
_MAX_CHANNELS = 2048


class NearDuplicateSample(StrictModel):
    """A member of a group; `label` is null where it has none."""

    sample_id: str
    split: str
    label: str | None


class NearDuplicateGroup(StrictModel):
    """Samples that show one picture; `score` is that of the weakest link between them, see `DuplicateGroup`.

    Of examples that are `size` samples the first 20 are named: a placeholder may be there thousands of times.
    """

    score: float
    samples: list[NearDuplicateSample]
    size: int = 0

    @property
    def num_unnamed(self) -> int:
        """How many there are besides."""
        return max(self.size - len(self.samples), 0)


class NearDuplicateReport(StrictModel):
    """Groups of near duplicates among `compared` samples of some `splits`; exact duplicates are among them.

    `samples` are in a group, `spare` of them could go and leave one of each group. Groups that disagree on the label or
    cross splits come first among the `examples`, then the surest. Reports of older versions name no splits.
    """

    threshold: float
    compared: int
    groups: int
    samples: int
    spare: int
    across_splits: int
    label_conflicts: int
    examples: list[NearDuplicateGroup]
    splits: list[str] = Field(default_factory=list)


def last_of_sizes(axis: DepthAxis, number: int) -> list[Stage]:
    """The last stage of each size of maps, of these the `number` deepest, in the order of depth."""
    last_of_size = {stage.resolution_px: stage for stage in axis if stage.kind is StageKind.SPATIAL}
    return sorted(last_of_size.values(), key=lambda stage: stage.index)[-number:]


def near_duplicate_taps(axis: DepthAxis) -> tuple[str, ...]:
    """The taps whose features together tell pictures apart: the last stages of the three smallest sizes of maps.

    Of these the narrowest, as long as they have no more than 2,048 channels together.
    """
    taps: list[Stage] = []
    width = 0
    for stage in sorted(last_of_sizes(axis, _NUM_TAPS), key=lambda stage: stage.channels):
        width += stage.channels
        if not taps or width <= _MAX_CHANNELS:
            taps.append(stage)
    return tuple(stage.name for stage in sorted(taps, key=lambda stage: stage.index))


def joined_taps(features: Sequence[NDArray[Any]]) -> NDArray[np.float32]:
    """The features_ND of several taps beside each other, each tap scaled to a total variance of 1."""
    scaled = []
    for features_ND in features:
        variance = float(features_ND.var(axis=0, dtype=np.float64).sum())
        scaled.append(features_ND.astype(np.float32) / np.float32(np.sqrt(variance) if variance else 1.0))
    return np.concatenate(scaled, axis=1)


def report_near_duplicates(
    features_ND: NDArray[Any],
    rows: pa.Table,
    classes: Sequence[str],
    threshold: float = NEAR_DUPLICATE_THRESHOLD,
) -> NearDuplicateReport:
    """What near duplicates there are among rows (columns sample_id, split, label) in the order of the features.

    For the features see `near_duplicate_taps` and `joined_taps`; errors are those of `find_near_duplicates`.
    """
    rows = rows.select(["sample_id", "split", "label"]).combine_chunks()
    ids = rows["sample_id"].to_pylist()
    found = find_near_duplicates(features_ND, ids, threshold)
    row_of = {sample_id: row for row, sample_id in enumerate(ids)}
    groups = [_described(group, rows, row_of, classes) for group in found.groups]
    # As among exact copies, one without a label contradicts nobody.
    conflicting = [group for group in groups if len({one.label for one in group.samples} - {None}) > 1]
    crossing = [group for group in groups if len({one.split for one in group.samples}) > 1]
    # By identity: equal groups cannot be, but comparing them member by member would take long.
    worst = {id(group): group for group in [*conflicting, *crossing, *groups]}
    num_samples = sum(len(group.samples) for group in groups)
    return NearDuplicateReport(
        threshold=threshold,
        compared=found.samples,
        groups=len(groups),
        samples=num_samples,
        spare=num_samples - len(groups),
        across_splits=len(crossing),
        label_conflicts=len(conflicting),
        examples=[
            group.model_copy(update={"samples": group.samples[:_NUM_NAMED]})
            for group in list(worst.values())[:_NUM_EXAMPLES]
        ],
        splits=sorted(pc.unique(rows["split"]).to_pylist()),
    )


def _described(
    group: DuplicateGroup, rows: pa.Table, row_of: dict[str, int], classes: Sequence[str]
) -> NearDuplicateGroup:
    members = rows.take(pa.array([row_of[sample_id] for sample_id in group.sample_ids])).to_pylist()
    return NearDuplicateGroup(
        score=group.score,
        size=len(members),
        samples=[
            NearDuplicateSample(
                sample_id=member["sample_id"],
                split=member["split"],
                label=None if member["label"] is None else classes[member["label"]],
            )
            for member in members
        ],
    )
