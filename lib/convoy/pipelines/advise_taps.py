"""At which depths of a backbone advice probes."""

from __future__ import annotations

import numpy as np

from convoy.pipelines.advise_config import CandidateBackbone
from convoy.pipelines.backbone_record import BackboneRecord
from convoy.vision.stages import POOLED, DepthAxis, StageKind


def spread_taps(axis: DepthAxis, num_taps: int) -> tuple[str, ...]:
    """Stages at even distances over the depth of the maps, the last one and the pooled features among them."""
    maps = [stage.name for stage in axis if stage.kind is StageKind.SPATIAL]
    places = np.linspace(0, len(maps) - 1, min(max(num_taps - 1, 1), len(maps))).round().astype(int)
    return tuple(dict.fromkeys([*(maps[place] for place in places), _top(axis)]))


def probed_taps(candidate: CandidateBackbone, record: BackboneRecord) -> tuple[str, ...]:
    """The taps that are probed, by their full names."""
    wanted = candidate.taps or spread_taps(record.axis, candidate.num_taps)
    return tuple(dict.fromkeys(record.resolve_tap(tap) for tap in wanted))


def _top(axis: DepthAxis) -> str:
    names = [stage.name for stage in axis]
    return POOLED if POOLED in names else names[-2] if len(names) > 1 else names[-1]
