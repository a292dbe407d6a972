"""`convoy evaluate`: manifest → features or crops → predictions → metrics with intervals.

One model at its central crop is evaluated from the feature cache; ensembles, more crops and cheaper modes by the
committee operator.
"""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from convoy.core.config import StrictModel
from convoy.core.crop_policies import (
    Averaging,
    CropPlan,
    CropPolicy,
    EvaluationMode,
    MemberOutputs,
    MultiscaleCrops,
)
from convoy.core.progress import Progress
from convoy.core.records import Split
from convoy.pipelines.classifiers import Classifier, as_is, classifier_digest
from convoy.pipelines.committee_evaluation import (
    CommitteeCost,
    MemberEvaluation,
    ModeEffect,
    evaluate_committee,
)
from convoy.pipelines.committee_predictions import PredictionRequest
from convoy.pipelines.committees import (
    CommitteeRecord,
    EnsembleConfig,
    configured_committee,
    open_committee,
    single_committee,
)
from convoy.pipelines.evaluation import Evaluation, EvaluationTask, evaluate_classifier
from convoy.pipelines.feature_plan import ErrorBudget, ExtractionConfig
from convoy.pipelines.models import fetch_backbone
from convoy.pipelines.workspace import WriterMode, open_workspace
from convoy.storage.datasets import open_dataset
from convoy.storage.manifests import Manifest
from convoy.storage.object_store import ObjectStore
from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.committee_options import GateOptions


class PretrainedModel(StrictModel):
    """A pretrained network as it is. `classes` names its outputs in order, where its weights do not."""

    backbone: BackboneConfig
    classes: tuple[str, ...] | None = None


class EvaluationSettings(StrictModel):
    """On which rows models are measured, and how: what all configs of evaluations share.

    `crops` are those that every network sees of an image (null: an ensemble's own, else the centre), `multiscale`
    those of that policy. `keep` says which predictions of members are kept beside the joint ones. `gate` takes the
    place of an ensemble's own in the mode `gated`.
    """

    workspace: str | None = None
    writers: WriterMode = WriterMode.MANY
    dataset: str
    splits: tuple[Split, ...] = (Split.TEST,)
    crops: CropPolicy | None = None
    multiscale: MultiscaleCrops = MultiscaleCrops()
    mode: EvaluationMode = EvaluationMode.EXACT
    gate: GateOptions | None = None
    keep: MemberOutputs = MemberOutputs.MEMBERS
    extraction: ExtractionConfig = ExtractionConfig()
    error_budget: ErrorBudget = ErrorBudget()


class EvaluateConfig(EvaluationSettings):
    """What is measured, on what: a `bundle` of the workspace, a pretrained `model`, or an `ensemble` of such."""

    bundle: str | None = None
    model: PretrainedModel | None = None
    ensemble: EnsembleConfig | None = None

    @model_validator(mode="after")
    def _one_model(self) -> Self:
        if sum(given is not None for given in (self.bundle, self.model, self.ensemble)) != 1:
            raise ValueError("give either bundle, model or ensemble")
        return self


class EvaluateReport(Evaluation):
    """The evaluation, and whether the rejects are within the error budget.

    What is null was not asked for: a single model at its central crop has no `averaging`, `cost` or `effect`.
    """

    crops: CropPolicy = CropPolicy.CENTER
    averaging: Averaging | None = None
    mode: EvaluationMode = EvaluationMode.EXACT
    members: list[MemberEvaluation] = Field(default_factory=list)
    cost: CommitteeCost | None = None
    effect: ModeEffect | None = None
    within_error_budget: bool


def run_evaluate(config: EvaluateConfig, *, progress: Progress, new_run: bool = False) -> EvaluateReport:
    """Predict every sample of the splits and measure the predictions."""
    store = open_workspace(config.workspace, config.writers)
    manifest = open_dataset(store, config.dataset)
    committee = _open_committee(store, config)
    if is_plain(committee, config.mode):
        evaluation = _evaluate_from_cache(store, manifest, committee, config, progress, new_run=new_run)
    else:
        request = PredictionRequest(
            committee=committee,
            dataset=config.dataset,
            splits=config.splits,
            extraction=config.extraction,
            keep=config.keep,
            mode=config.mode,
        )
        evaluation = evaluate_committee(
            store,
            manifest,
            request,
            progress=progress,
            config=config.model_dump(mode="json"),
            new_run=new_run,
        )
    return EvaluateReport(
        **evaluation.model_dump(),
        within_error_budget=config.error_budget.allows(evaluation.rejects, evaluation.samples),
    )


def is_plain(committee: CommitteeRecord, mode: EvaluationMode) -> bool:
    """Whether this is one model as it is at its central crop, whose features may be cached."""
    (member, *others) = committee.members
    return (
        not others
        and committee.plan.policy is CropPolicy.CENTER
        and mode is EvaluationMode.EXACT
        and member.temperature == committee.temperature == 1
    )


def _open_committee(store: ObjectStore, config: EvaluateConfig) -> CommitteeRecord:
    if config.ensemble is not None:
        committee = configured_committee(store, config.ensemble, config.extraction)
    elif config.model is not None:
        backbone = fetch_backbone(store, config.model.backbone)
        classifier = as_is(backbone, config.model.classes, config.extraction)
        committee = single_committee(classifier, name=backbone.arch, digest=classifier_digest(classifier))
    else:
        committee = open_committee(store, config.bundle or "")
    if config.crops is not None:
        committee = committee.with_plan(CropPlan(policy=config.crops, multiscale=config.multiscale))
    return committee if config.gate is None else committee.with_gate(config.gate)


def _evaluate_from_cache(
    store: ObjectStore,
    manifest: Manifest,
    committee: CommitteeRecord,
    config: EvaluateConfig,
    progress: Progress,
    *,
    new_run: bool,
) -> Evaluation:
    (member,) = committee.members
    classifier: Classifier = member.classifier
    task = EvaluationTask(
        classifier=classifier,
        model_digest=member.digest,
        dataset=config.dataset,
        splits=config.splits,
        extraction=classifier.extraction_like(config.extraction),
        config=config.model_dump(mode="json"),
    )
    return evaluate_classifier(store, manifest, task, progress=progress, new_run=new_run)
