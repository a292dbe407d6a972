"""`convoy cache`: config → manifest → what the cache already has → slices → parts → commit → report."""

from __future__ import annotations

from pydantic import Field

from convoy.core.config import StrictModel
from convoy.core.progress import Progress
from convoy.core.records import Split
from convoy.pipelines.feature_plan import ErrorBudget, ExtractionConfig, FeatureRequest
from convoy.pipelines.features import FeatureJob, FeaturePlan, FeatureSummary
from convoy.pipelines.models import fetch_backbone
from convoy.pipelines.workspace import WriterMode, open_workspace
from convoy.storage.datasets import open_dataset
from convoy.storage.duplicates import DuplicateReport, find_duplicates
from convoy.storage.manifests import Manifest
from convoy.storage.object_store import ObjectStore
from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.view_policy import ViewPolicy


class CacheConfig(StrictModel):
    """Which samples, which network, which taps and views."""

    workspace: str | None = None
    writers: WriterMode = WriterMode.MANY
    dataset: str
    splits: tuple[Split, ...] | None = None
    backbone: BackboneConfig
    taps: tuple[str | int, ...] = ("pooled",)
    views: int = Field(default=1, ge=1)
    view_policy: ViewPolicy = ViewPolicy()
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
    job = _job(store, manifest, config)
    summary = job.ensure(progress=progress, new_run=new_run)
    return CacheReport(
        **summary.model_dump(),
        dataset=config.dataset,
        fingerprint=manifest.fingerprint,
        duplicates=find_duplicates(store, manifest, job.sets[0].set_id),
        within_error_budget=config.error_budget.allows(summary.rejects, summary.samples),
    )


def plan_cache(config: CacheConfig) -> CachePlan:
    """What `run_cache` would do; only the backbone is brought into the workspace if it is not there."""
    store = open_workspace(config.workspace, config.writers)
    job = _job(store, open_dataset(store, config.dataset), config)
    return CachePlan(config=config, **job.plan().model_dump())


def _job(store: ObjectStore, manifest: Manifest, config: CacheConfig) -> FeatureJob:
    backbone = fetch_backbone(store, config.backbone)
    return FeatureJob(store, manifest, backbone, _request(config), config.extraction)


def _request(config: CacheConfig) -> FeatureRequest:
    return FeatureRequest(
        dataset=config.dataset,
        splits=config.splits,
        backbone=config.backbone,
        taps=config.taps,
        views=config.views,
        view_policy=config.view_policy,
    )
