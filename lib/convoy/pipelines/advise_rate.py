"""How fast a network is, by the passes through it that the feature cache was filled with."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from convoy.pipelines.backbone_record import BackboneRecord
from convoy.pipelines.feature_plan import forward_s
from convoy.pipelines.feature_summary import FeatureSummary, seconds_under_way
from convoy.storage.commits import read_commits, read_manifest
from convoy.storage.object_store import ObjectStore
from convoy.storage.runs import RunFolder, RunRecord
from convoy.vision.stages import DepthAxis, StageKind


class PassRate(NamedTuple):
    """Images that went once through a network, how many a second, and in which run; 0 images and no run: a guess."""

    num_images: int
    images_per_s: float
    run: str


def pass_rate(store: ObjectStore, backbone: BackboneRecord, look: FeatureSummary) -> PassRate:
    """The rate of the largest run that took each image once through the network, in its time at work.

    The last run may be of the three images that were new, and of nothing but a start. Runs of other sets than those of
    the look do not count, as each further view is a pass of its own, nor those that end before its last map. Without
    any the rate is that of the multiply-adds on two cores, for no images.
    """
    sets, whole = set(look.sets.values()), _whole_passes(backbone.axis, look)
    num_rows = Counter[str]()
    for commit in (one for set_id in sets for one in read_commits(store, set_id)):
        rows = sum(part.num_rows for part in commit.parts)
        num_rows[commit.run_id] = max(num_rows[commit.run_id], rows)
    for run_id, _ in num_rows.most_common():
        folder = RunFolder(store, run_id)
        record, manifest = folder.record(), read_manifest(folder)
        if record is not None and manifest is not None and _is_one_pass(record, sets, whole):
            num_images = manifest.num_results + manifest.num_rejects
            seconds = max(seconds_under_way(manifest.slices), 1e-9)
            return PassRate(num_images, num_images / seconds, run_id)
    return PassRate(0, 1 / forward_s(backbone.macs), "")


def _whole_passes(axis: DepthAxis, look: FeatureSummary) -> set[str]:
    """The sets of a look at its last map and behind it: from there to the outputs costs next to nothing."""
    stages = [stage for stage in axis if f"{stage.name}/0" in look.sets]
    last_map = max(stage.index for stage in stages if stage.kind is StageKind.SPATIAL)
    return {look.sets[f"{stage.name}/0"] for stage in stages if stage.index >= last_map}


def _is_one_pass(record: RunRecord, sets: set[str], whole: set[str]) -> bool:
    return all(
        sets.issuperset(group.outputs) and not whole.isdisjoint(group.outputs) for group in record.groups
    )
