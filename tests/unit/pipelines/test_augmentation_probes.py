"""Drawn views: those are computed that are looked at, and no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from convoy.core.records import Split
from convoy.pipelines.augmentation_effect import AugmentationEffectConfig, named_policies
from convoy.pipelines.augmentation_outcomes import NamedPolicy
from convoy.pipelines.augmentation_probes import PartJob, ViewProbes
from convoy.pipelines.feature_plan import ExtractionConfig, ManyPolicies
from convoy.pipelines.models import fetch_backbone
from convoy.pipelines.probe_judging import ProbeRows
from convoy.pipelines.training_rows import RowLimit
from convoy.storage.local_store import LocalStore
from convoy.vision.augmentation_strengths import AugmentationKind
from convoy.vision.backbone_config import BackboneConfig
from made_advice_rows import frozen_rows

COUNTS = {Split.TRAIN: (30, 30), Split.VAL: (50, 50)}


def view_jobs(
    folder: Path, *, batch_size: int, **settings: Any
) -> tuple[list[NamedPolicy], list[list[PartJob]]]:
    """The policies of a config, and the jobs of the rows to learn from and of those that judge."""
    store, manifest = LocalStore(str(folder)), frozen_rows(folder, COUNTS, ("good", "defect"))
    backbone = fetch_backbone(store, BackboneConfig(arch="lenet5", weights="random"))
    config = AugmentationEffectConfig(**settings)
    policies = named_policies(config, crop_px=backbone.preset.crop_px)
    request = ManyPolicies(
        dataset="d", backbone=backbone.config, taps=("pooled",), views=config.views + 1, policies=()
    )
    extraction = ExtractionConfig(batch_size=batch_size)
    probes = ViewProbes(store, manifest, ProbeRows.of(manifest, RowLimit()), request, extraction, config.head)
    return policies, list(probes.jobs(backbone, policies))


def test_judged_rows_are_drawn_once_a_policy_and_training_rows_in_all_views(tmp_path: Path) -> None:
    policies, jobs = view_jobs(tmp_path, batch_size=32, views=3, kinds=("mirror", "grey"))
    learnt, judged = (sum(sum(job.plan().missing_by_set.values()) for _, job in one) for one in jobs)
    assert learnt == 60 * (1 + 3 * len(policies))
    assert judged == 100 * (1 + len(policies))


def test_a_pass_draws_views_of_as_many_policies_as_a_worker_can_hold(tmp_path: Path) -> None:
    kinds = tuple(kind for kind in AugmentationKind if kind is not AugmentationKind.PCA_COLOUR)
    policies, jobs = view_jobs(tmp_path, batch_size=1024, views=4, kinds=kinds)
    for parts in jobs:
        assert [policy for part, _ in parts for policy in part] == policies
        for part, job in parts:
            assert len({job.set_id("pooled", 1, policy.policy) for policy in part}) == len(part)
    learnt, judged = jobs
    assert len(judged) == 1 < len(learnt)
