"""`convoy evaluate`: manifest → features → predictions → metrics with intervals."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from convoy.core.config import StrictModel
from convoy.core.progress import Progress
from convoy.core.records import Split
from convoy.pipelines.classifiers import Classifier, as_is, classifier_digest, read_classifier
from convoy.pipelines.evaluation import Evaluation, EvaluationTask, evaluate_classifier
from convoy.pipelines.feature_plan import ErrorBudget, ExtractionConfig
from convoy.pipelines.models import fetch_backbone
from convoy.pipelines.workspace import WriterMode, open_workspace
from convoy.storage.bundles import open_bundle
from convoy.storage.datasets import open_dataset
from convoy.storage.object_store import ObjectStore
from convoy.vision.backbone_config import BackboneConfig


class PretrainedModel(StrictModel):
    """A pretrained network as it is. `classes` names its outputs in order, where its weights do not."""

    backbone: BackboneConfig
    classes: tuple[str, ...] | None = None


class EvaluationSettings(StrictModel):
    """On which rows models are measured, and how: what all configs of evaluations share."""

    workspace: str | None = None
    writers: WriterMode = WriterMode.MANY
    dataset: str
    splits: tuple[Split, ...] = (Split.TEST,)
    extraction: ExtractionConfig = ExtractionConfig()
    error_budget: ErrorBudget = ErrorBudget()


class EvaluateConfig(EvaluationSettings):
    """What is measured, on what: either a `bundle` of the workspace or a pretrained `model`."""

    bundle: str | None = None
    model: PretrainedModel | None = None

    @model_validator(mode="after")
    def _one_model(self) -> Self:
        if (self.bundle is None) == (self.model is None):
            raise ValueError("give either bundle or model")
        return self


class EvaluateReport(Evaluation):
    """The evaluation, and whether the rejects are within the error budget."""

    within_error_budget: bool


def run_evaluate(config: EvaluateConfig, *, progress: Progress, new_run: bool = False) -> EvaluateReport:
    """Predict every sample of the splits and measure the predictions."""
    store = open_workspace(config.workspace, config.writers)
    manifest = open_dataset(store, config.dataset)
    classifier, model_digest = _open_model(store, config)
    task = EvaluationTask(
        classifier=classifier,
        model_digest=model_digest,
        dataset=config.dataset,
        splits=config.splits,
        extraction=classifier.extraction_like(config.extraction),
        config=config.model_dump(mode="json"),
    )
    evaluation = evaluate_classifier(store, manifest, task, progress=progress, new_run=new_run)
    return EvaluateReport(
        **evaluation.model_dump(),
        within_error_budget=config.error_budget.allows(evaluation.rejects, evaluation.samples),
    )


def _open_model(store: ObjectStore, config: EvaluateConfig) -> tuple[Classifier, str]:
    if config.model is not None:
        backbone = fetch_backbone(store, config.model.backbone)
        classifier = as_is(backbone, config.model.classes, config.extraction)
        return classifier, classifier_digest(classifier)
    bundle = open_bundle(store, config.bundle or "")
    return read_classifier(store, bundle), bundle.ref.digest
