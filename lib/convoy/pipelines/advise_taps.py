"""At which depths of a backbone advice probes, and which of the stages that a config names it has."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from convoy.core.errors import ConfigError
from convoy.pipelines.advise_config import AdviseConfig, CandidateBackbone
from convoy.pipelines.augmentation_effect import AugmentationEffectConfig, EffectBudget
from convoy.pipelines.backbone_record import BackboneRecord
from convoy.vision.stages import POOLED, DepthAxis, StageKind, resolve_tap


def spread_taps(axis: DepthAxis, num_taps: int) -> tuple[str, ...]:
    """Stages at even distances over the depth of the maps, the last one and the pooled features among them."""
    maps = [stage.name for stage in axis if stage.kind is StageKind.SPATIAL]
    places = np.linspace(0, len(maps) - 1, min(max(num_taps - 1, 1), len(maps))).round().astype(int)
    return tuple(dict.fromkeys([*(maps[place] for place in places), _top(axis)]))


def probed_taps(candidate: CandidateBackbone, record: BackboneRecord) -> tuple[str, ...]:
    """The taps that are probed, by their full names."""
    wanted = candidate.taps or spread_taps(record.axis, candidate.num_taps)
    return tuple(dict.fromkeys(record.resolve_tap(tap) for tap in wanted))


def known_stage(record: BackboneRecord, tap: str | int) -> str | None:
    """The full name of a stage, or None where the backbone has no such stage."""
    try:
        return record.resolve_tap(tap)
    except ConfigError:
        return None


def probed_stage(effect: AugmentationEffectConfig | None) -> str | int | None:
    """The stage by whose features augmentation is judged, None where it is not judged by a probe."""
    return effect.tap if effect is not None and effect.budget is EffectBudget.PROBE else None


def refuse_unknown_stages(config: AdviseConfig, records: Sequence[BackboneRecord]) -> None:
    """ConfigError for a stage that is to be reused, or probed under augmentation, and that no candidate has."""
    reuse = config.network.reuse
    named = {
        "network.reuse.after": None if reuse is None else reuse.after,
        "augmentation_effect.tap": probed_stage(config.augmentation_effect),
    }
    for where, tap in named.items():
        if tap is not None and not any(known_stage(record, tap) for record in records):
            resolve_tap(records[0].axis, tap, where=where)


def _top(axis: DepthAxis) -> str:
    names = [stage.name for stage in axis]
    return POOLED if POOLED in names else names[-2] if len(names) > 1 else names[-1]
