"""`convoy evaluate`: manifest → features or crops → predictions → metrics with intervals.

One model at its central crop is evaluated from the feature cache; ensembles, more crops and cheaper modes by the
committee operator.
"""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from convoy.core.crop_policies import Averaging, CropPolicy, EvaluationMode, MemberOutputs
from convoy.core.progress import Progress
from convoy.core.records import Split
from convoy.core.splits import ChosenSplits
from convoy.pipelines.classifiers import Classifier
from convoy.pipelines.committee_evaluation import (
    CommitteeCost,
    MemberEvaluation,
    ModeEffect,
    evaluate_committee,
)
from convoy.pipelines.committees import CommitteeRecord
from convoy.pipelines.evaluation import Evaluation, EvaluationTask, evaluate_classifier
from convoy.pipelines.feature_plan import ErrorBudget, ExtractionConfig
from convoy.pipelines.model_choice import ModelChoice, ViewSettings, chosen_committee
from convoy.pipelines.prediction_request import PredictionRequest
from convoy.pipelines.training_overlap import overlap_notes
from convoy.pipelines.workspace import open_workspace
from convoy.storage.datasets import open_dataset
from convoy.storage.manifests import Manifest
from convoy.storage.object_store import ObjectStore, WriterMode


class EvaluationSettings(ViewSettings):
    """On which rows models are measured, and how: what all configs of evaluations share.

    `keep` says which predictions of members are kept beside the joint ones. In the mode `gated` none are: not every
    member sees every image.
    """

    workspace: str | None = None
    writers: WriterMode = WriterMode.MANY
    dataset: str
    splits: ChosenSplits = (Split.TEST,)
    keep: MemberOutputs = MemberOutputs.MEMBERS
    extraction: ExtractionConfig = ExtractionConfig()
    error_budget: ErrorBudget = ErrorBudget()

    @model_validator(mode="after")
    def _views_can_be_kept(self) -> Self:
        if self.keep is MemberOutputs.VIEWS and self.mode is EvaluationMode.GATED:
            raise ValueError(
                "mode gated has no views to keep, as not every member sees every image: set mode=exact"
            )
        return self


class EvaluateConfig(EvaluationSettings, ModelChoice):
    """What is measured, on what: a `bundle` of the workspace, a pretrained `model`, or an `ensemble` of such."""


class EvaluateReport(Evaluation):
    """The evaluation, and whether the rejects are within the error budget.

    What is null was not asked for: a single model at its central crop has no `averaging`, `cost` or `effect`. Of the
    rejects of a committee `unfetched` could not be fetched; those of a single model are tried again each time.
    """

    crops: CropPolicy = CropPolicy.CENTER
    averaging: Averaging | None = None
    mode: EvaluationMode = EvaluationMode.EXACT
    members: list[MemberEvaluation] = Field(default_factory=list)
    cost: CommitteeCost | None = None
    effect: ModeEffect | None = None
    unfetched: int = 0
    notes: list[str] = Field(default_factory=list)
    within_error_budget: bool


def run_evaluate(config: EvaluateConfig, *, progress: Progress, new_run: bool = False) -> EvaluateReport:
    """Predict every sample of the splits and measure the predictions."""
    store = open_workspace(config.workspace, config.writers)
    manifest = open_dataset(store, config.dataset)
    committee = chosen_committee(store, config, config, config.extraction)
    if config.keep is not MemberOutputs.VIEWS and is_plain(committee, config.mode):
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
    overlap = overlap_notes(store, manifest, config.dataset, config.splits, committee)
    report = evaluation.model_dump()
    return EvaluateReport(
        **report | {"notes": [*report.get("notes", ()), *overlap]},
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
