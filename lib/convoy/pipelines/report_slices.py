"""What a page says of the work of a run: its slices over time, and what was forecast against what came."""

from __future__ import annotations

from collections.abc import Sequence

from convoy.core.config import StrictModel
from convoy.pipelines.feature_summary import seconds_under_way, timings
from convoy.storage.commits import SliceRecord

_MAX_POINTS = 400


class SlicePoint(StrictModel):
    """A slice, or neighbours of one run that are drawn as one: when it ran, and how fast.

    Times are seconds since the first slice of the run began.
    """

    slice: str
    slices: int
    started_s: float
    seconds: float
    rows: int
    rejects: int
    images_per_s: float


class SliceSummary(StrictModel):
    """All slices of a run. `seconds` are those of the stages, summed over workers; `under_way_s` is without pauses."""

    slices: int
    rows: int
    rejects: int
    bytes_read: int
    under_way_s: float
    seconds: dict[str, float]
    points: list[SlicePoint]
    slowest: list[SlicePoint]


def summarise_slices(slices: Sequence[SliceRecord]) -> SliceSummary | None:
    """The slices in the order in which they began, at most 400 points; None where there is none."""
    if not slices:
        return None
    ordered = sorted(slices, key=lambda one: (one.started_unix_s, one.slice))
    first_s = ordered[0].started_unix_s
    each = -(-len(ordered) // _MAX_POINTS)
    points = [_point(ordered[start : start + each], first_s) for start in range(0, len(ordered), each)]
    alone = [_point([one], first_s) for one in sorted(ordered, key=_rate)[:10]]
    return SliceSummary(
        slices=len(ordered),
        rows=sum(one.num_results + one.num_rejects for one in ordered),
        rejects=sum(one.num_rejects for one in ordered),
        bytes_read=sum(one.bytes_read for one in ordered),
        under_way_s=seconds_under_way(ordered),
        seconds=timings(ordered, 0.0)["seconds"],
        points=points,
        slowest=alone,
    )


def _point(slices: Sequence[SliceRecord], first_s: float) -> SlicePoint:
    rows = sum(one.num_results + one.num_rejects for one in slices)
    seconds = seconds_under_way(slices)
    return SlicePoint(
        slice=slices[0].slice,
        slices=len(slices),
        started_s=slices[0].started_unix_s - first_s,
        seconds=seconds,
        rows=rows,
        rejects=sum(one.num_rejects for one in slices),
        images_per_s=rows / max(seconds, 1e-9),
    )


def _rate(one: SliceRecord) -> float:
    return (one.num_results + one.num_rejects) / max(one.finished_unix_s - one.started_unix_s, 1e-9)
