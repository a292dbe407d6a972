"""`convoy cache`: config → manifest → what the cache already has → slices → parts → commit → report."""

from __future__ import annotations

from convoy.core.progress import Progress
from convoy.pipelines.device_settings import foresee_precision
from convoy.pipelines.feature_plan import ErrorBudget, ExtractionConfig, FeatureRequest
from convoy.pipelines.feature_summary import FeaturePlan, FeatureSummary
from convoy.pipelines.features import FeatureJob
from convoy.pipelines.models import fetch_backbone
from convoy.pipelines.pixel_statistics import known_augmentation, resolve_augmentation
from convoy.pipelines.workspace import open_workspace
from convoy.storage.datasets import open_dataset
from convoy.storage.duplicates import DuplicateReport, find_duplicates
from convoy.storage.leases import WhenHeld
from convoy.storage.manifests import Manifest
from convoy.storage.object_store import ObjectStore, WriterMode
from convoy.vision.augmentation_policy import NO_COLOURS, AugmentationPolicy


class CacheConfig(FeatureRequest):
    """Which features of which samples, and how they are computed."""

    workspace: str | None = None
    writers: WriterMode = WriterMode.MANY
    extraction: ExtractionConfig = ExtractionConfig()
    error_budget: ErrorBudget = ErrorBudget()


class CacheReport(FeatureSummary):
    """What the cache holds now for this dataset, and what this call added."""

    dataset: str
    fingerprint: str
    duplicates: DuplicateReport
    within_error_budget: bool


class CachePlan(FeaturePlan):
    """The resolved config, and what it would do."""

    config: CacheConfig


def run_cache(config: CacheConfig, *, progress: Progress, new_run: bool = False) -> CacheReport:
    """See to it that the workspace has features of every sample of the dataset, and say what that took."""
    store = open_workspace(config.workspace, config.writers)
    manifest = open_dataset(store, config.dataset)
    policy = config.augmentation
    if config.views > 1:
        policy = resolve_augmentation(
            store, manifest, config.dataset, policy, config.extraction.decode, progress
        )
    job = _job(store, manifest, config, policy)
    ended = None if new_run else job.end_run_of_other_rows(progress)
    summary = job.ensure(progress=progress, new_run=new_run, when_held=WhenHeld.REFUSE)
    notes = [] if ended is None else [f"run {ended}, begun for other rows of these features, was ended first"]
    return CacheReport(
        **{**summary.model_dump(), "notes": [*notes, *summary.notes]},
        dataset=config.dataset,
        fingerprint=manifest.fingerprint,
        duplicates=find_duplicates(store, manifest, job.sets[0].set_id),
        within_error_budget=config.error_budget.allows(summary.rejects, summary.samples),
    )


def plan_cache(config: CacheConfig) -> CachePlan:
    """What `run_cache` would do; only the backbone is brought into the workspace if it is not there."""
    store = open_workspace(config.workspace, config.writers)
    manifest = open_dataset(store, config.dataset)
    policy, notes = config.augmentation, []
    if config.views > 1:
        known = known_augmentation(store, manifest, config.dataset, policy, config.extraction.decode)
        # Views on colours that nobody measured yet cannot be in the cache, whatever stands for them here.
        policy = known or policy.with_basis(NO_COLOURS)
        notes = [] if known else ["the colours of the train split will be measured first, for pca_colour"]
    extraction, precision_notes = foresee_precision(store, config.dataset, config.extraction)
    foreseen = config.model_copy(update={"extraction": extraction})
    plan = _job(store, manifest, foreseen, policy).plan()
    return CachePlan(config=config, **{**plan.model_dump(), "notes": [*notes, *plan.notes, *precision_notes]})


def _job(
    store: ObjectStore, manifest: Manifest, config: CacheConfig, policy: AugmentationPolicy
) -> FeatureJob:
    backbone = fetch_backbone(store, config.backbone)
    request = config.model_copy(update={"augmentation": policy})
    return FeatureJob(store, manifest, backbone, request, config.extraction)
