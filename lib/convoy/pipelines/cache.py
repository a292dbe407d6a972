"""`convoy cache`: config → manifest → what the cache already has → slices → parts → commit → report."""

from __future__ import annotations

from pydantic import Field

from convoy.core.config import StrictModel
from convoy.core.progress import Progress
from convoy.core.records import Split
from convoy.pipelines.feature_plan import ErrorBudget, ExtractionConfig, FeatureRequest
from convoy.pipelines.features import FeatureJob, FeatureSummary
from convoy.pipelines.models import fetch_backbone
from convoy.pipelines.workspace import WriterMode, open_workspace
from convoy.storage.datasets import open_dataset
from convoy.storage.duplicates import DuplicateReport, find_duplicates
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


def run_cache(config: CacheConfig, *, progress: Progress, new_run: bool = False) -> CacheReport:
    """See to it that the workspace has features of every sample of the dataset, and say what that took."""
    store = open_workspace(config.workspace, config.writers)
    manifest = open_dataset(store, config.dataset)
    backbone = fetch_backbone(store, config.backbone)
    job = FeatureJob(store, manifest, backbone, feature_request(config), config.extraction)
    summary = job.ensure(progress=progress, new_run=new_run)
    return CacheReport(
        **summary.model_dump(),
        dataset=config.dataset,
        fingerprint=manifest.fingerprint,
        duplicates=find_duplicates(store, manifest, job.sets[0].set_id),
        within_error_budget=config.error_budget.allows(summary.rejects, summary.samples),
    )


def feature_request(config: CacheConfig) -> FeatureRequest:
    """The part of the config that says which features."""
    return FeatureRequest(
        dataset=config.dataset,
        splits=config.splits,
        backbone=config.backbone,
        taps=config.taps,
        views=config.views,
        view_policy=config.view_policy,
    )
