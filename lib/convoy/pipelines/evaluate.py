"""`convoy evaluate`: manifest → features or crops → predictions → metrics with intervals.

One model at its central crop is evaluated from the feature cache; ensembles, more crops and cheaper modes by the
committee operator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from pydantic import Field, model_validator

from convoy.core.crop_policies import Averaging, CropPolicy, EvaluationMode, MemberOutputs
from convoy.core.progress import Progress
from convoy.core.records import Split
from convoy.core.splits import ChosenSplits
from convoy.pipelines.classifiers import Classifier, class_indices
from convoy.pipelines.committee_evaluation import (
    CommitteeCost,
    MemberEvaluation,
    ModeEffect,
    evaluate_committee,
)
from convoy.pipelines.committee_predictions import require_gate
from convoy.pipelines.committees import CommitteeRecord
from convoy.pipelines.evaluation import Evaluation, EvaluationTask, evaluate_classifier, require_labels
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


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedEvaluation:
    """An evaluation whose model and rows were found to fit; nothing is computed yet."""

    config: EvaluateConfig
    store: ObjectStore
    manifest: Manifest
    committee: CommitteeRecord

    def run(self, *, progress: Progress, new_run: bool = False) -> EvaluateReport:
        """Predict every sample of the splits and measure the predictions."""
        config = self.config
        if config.keep is not MemberOutputs.VIEWS and is_plain(self.committee, config.mode):
            evaluation = self._from_cache(progress, new_run=new_run)
        else:
            evaluation = self._by_committee(progress, new_run=new_run)
        overlap = overlap_notes(self.store, self.manifest, config.dataset, config.splits, self.committee)
        report = evaluation.model_dump()
        return EvaluateReport(
            **report | {"notes": [*report.get("notes", ()), *overlap]},
            within_error_budget=config.error_budget.allows(evaluation.rejects, evaluation.samples),
        )

    def _from_cache(self, progress: Progress, *, new_run: bool) -> Evaluation:
        (member,) = self.committee.members
        classifier: Classifier = member.classifier
        task = EvaluationTask(
            classifier=classifier,
            model_digest=member.digest,
            dataset=self.config.dataset,
            splits=self.config.splits,
            extraction=classifier.extraction_like(self.config.extraction),
            config=self.config.model_dump(mode="json"),
        )
        return evaluate_classifier(self.store, self.manifest, task, progress=progress, new_run=new_run)

    def _by_committee(self, progress: Progress, *, new_run: bool) -> Evaluation:
        request = PredictionRequest(
            committee=self.committee,
            dataset=self.config.dataset,
            splits=self.config.splits,
            extraction=self.config.extraction,
            keep=self.config.keep,
            mode=self.config.mode,
        )
        return evaluate_committee(
            self.store,
            self.manifest,
            request,
            progress=progress,
            config=self.config.model_dump(mode="json"),
            new_run=new_run,
        )


def run_evaluate(config: EvaluateConfig, *, progress: Progress, new_run: bool = False) -> EvaluateReport:
    """Predict every sample of the splits and measure the predictions."""
    return open_evaluation(config).run(progress=progress, new_run=new_run)


def open_evaluation(config: EvaluateConfig) -> OpenedEvaluation:
    """The model and the rows of an evaluation.

    Raises DataError where no row has a label, ConfigError for a model that does not know the classes of the dataset,
    or has no gate for the mode `gated`.
    """
    store = open_workspace(config.workspace, config.writers)
    manifest = open_dataset(store, config.dataset)
    require_labels(manifest, config.splits)
    committee = chosen_committee(store, config, config, config.extraction)
    class_indices(
        manifest.classes, committee.classes, model=config.in_words, next_step=_advice_on_classes(config)
    )
    if config.mode is EvaluationMode.GATED:
        require_gate(committee)
    return OpenedEvaluation(config=config, store=store, manifest=manifest, committee=committee)


def _advice_on_classes(choice: ModelChoice) -> str:
    """What to do where the model does not know the classes of the dataset."""
    advice = "evaluate on a dataset with its class names, or give its outputs those of the dataset: "
    if choice.model is not None:
        return f"{advice}model.classes names all in order, model.class_map some"
    if choice.ensemble is not None and all(member.backbone for member in choice.ensemble.members):
        return f"{advice}of a member, classes names all in order, class_map some"
    return "evaluate on a dataset with its class names, or a model that was trained on these"


def is_plain(committee: CommitteeRecord, mode: EvaluationMode) -> bool:
    """Whether this is one model as it is at its central crop, whose features may be cached."""
    (member, *others) = committee.members
    return (
        not others
        and committee.plan.policy is CropPolicy.CENTER
        and mode is EvaluationMode.EXACT
        and member.temperature == committee.temperature == 1
    )
