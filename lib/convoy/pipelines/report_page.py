"""`convoy report RUN|DATASET|BUNDLE`: all that a page shows, read from the workspace in bounded memory.

What a target does not have is left out, and what could not be read is said: a page is made of what there is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from convoy.core.config import StrictModel
from convoy.core.errors import ConvoyError
from convoy.core.progress import Progress
from convoy.core.training_events import EpochResult
from convoy.pipelines.advise_report import AdviceReport
from convoy.pipelines.committee_evaluation import CommitteeCost, MemberEvaluation, ModeEffect
from convoy.pipelines.data_origin import dataset_of_run
from convoy.pipelines.ensemble_building import EnsembleReport
from convoy.pipelines.evaluation import Evaluation
from convoy.pipelines.inspect_report import InspectionReport
from convoy.pipelines.model_listing import ModelDescription, show_model
from convoy.pipelines.report_data_card import DataCard, read_data_card
from convoy.pipelines.report_images import read_rule
from convoy.pipelines.report_inspection import InspectionPicture, read_pictures
from convoy.pipelines.report_lineage import LineageLink, lineage_of_bundle, lineage_of_run
from convoy.pipelines.report_predictions import PredictionSummary, summarise_predictions
from convoy.pipelines.report_rejects import RejectSummary, summarise_rejects
from convoy.pipelines.report_sheet import AugmentationSheet, read_sheet
from convoy.pipelines.report_slices import SliceSummary, summarise_slices
from convoy.pipelines.report_subgroups import Subgroup, summarise_subgroups
from convoy.pipelines.report_target import Target, TargetKind, find_target
from convoy.pipelines.report_writing import write_html
from convoy.pipelines.retrain_config import RetrainReport
from convoy.pipelines.runs_show import RunDescription, show_run
from convoy.pipelines.runs_state import RunState
from convoy.pipelines.scoring_plan import GIVES_PROBABILITIES
from convoy.pipelines.workspace import workspace_store
from convoy.storage.bundles import METRICS_FILE, Bundle, peek_bundle
from convoy.storage.commits import RunManifest, read_manifest
from convoy.storage.datasets import open_dataset
from convoy.storage.documents import read_json
from convoy.storage.object_store import ObjectStore
from convoy.storage.predictions import PREDICTIONS
from convoy.storage.retrains import RetrainFolder
from convoy.storage.runs import RunFolder

ModelT = TypeVar("ModelT", bound=BaseModel)
PartT = TypeVar("PartT")


class CommitteeParts(StrictModel):
    """What an evaluation of several networks or crops adds: members alone, cost, and the effect of a cheaper mode."""

    crops: str = "center"
    averaging: str | None = None
    mode: str = "exact"
    members: list[MemberEvaluation] = Field(default_factory=list)
    cost: CommitteeCost | None = None
    effect: ModeEffect | None = None


class PageData(StrictModel):
    """What a page shows; null or empty is what its target does not have. `missing` says what could not be read.

    `report` is what the job itself wrote down. `version` changes with what the target is: the images of a dataset, the
    aliases of a model, the state of a run.
    """

    target: str
    kind: TargetKind
    name: str
    workspace: str
    version: str = ""
    run: RunDescription | None = None
    model: ModelDescription | None = None
    report: dict[str, Any] = Field(default_factory=dict)
    data_card: DataCard | None = None
    sheet: AugmentationSheet | None = None
    rejects: RejectSummary | None = None
    history: list[EpochResult] = Field(default_factory=list)
    evaluation: Evaluation | None = None
    committee: CommitteeParts | None = None
    predictions: PredictionSummary | None = None
    subgroups: list[Subgroup] = Field(default_factory=list)
    slices: SliceSummary | None = None
    ensemble: EnsembleReport | None = None
    advice: AdviceReport | None = None
    inspection: InspectionReport | None = None
    pictures: list[InspectionPicture] = Field(default_factory=list)
    trials: list[dict[str, Any]] = Field(default_factory=list)
    retrains: list[RetrainReport] = Field(default_factory=list)
    lineage: list[LineageLink] = Field(default_factory=list)
    missing: list[str] = Field(default_factory=list)


class PageReport(StrictModel):
    """Where the page is, what it is about, how large it is, and what could not be shown."""

    output: str
    target: str
    size_bytes: int
    notes: list[str]


PageDrawer = Callable[[PageData], bytes]


def write_page(
    workspace: str | None, reference: str, output: str, draw: PageDrawer, *, progress: Progress
) -> PageReport:
    """Draw the page of a run, dataset or model, and write it to a local path. Errors as `find_target`."""
    store = workspace_store(workspace)
    page = read_page(store, find_target(store, reference), progress=progress)
    progress.stage("drawing")
    size_bytes = write_html(output, draw(page))
    return PageReport(output=output, target=page.target, size_bytes=size_bytes, notes=page.missing)


def version_of_model(aliases: Sequence[str]) -> str:
    """What a model's page is a page of: retrainings move its aliases."""
    return ",".join(sorted(aliases)) or "none"


def version_of_run(state: RunState | None) -> str:
    """What a run's page is a page of: a finished run is what it is, another goes on."""
    return "" if state is RunState.FINISHED else str(state or "unknown")


def read_page(store: ObjectStore, target: Target, *, progress: Progress) -> PageData:
    """All that the page of a target shows."""
    reader = _Reader(store, target, progress)
    if target.kind is TargetKind.DATASET:
        reader.read_dataset()
    elif target.kind is TargetKind.MODEL:
        reader.read_model()
    else:
        reader.read_run()
    return PageData(
        target=str(target),
        kind=target.kind,
        name=target.name,
        workspace=store.root_uri,
        missing=reader.missing,
        **reader.parts,
    )


class _Reader:
    """Reads the parts of one page. A part that fails becomes a line of `missing`."""

    def __init__(self, store: ObjectStore, target: Target, progress: Progress) -> None:
        self._store, self._target, self._progress = store, target, progress
        self.parts: dict[str, Any] = {}
        self.missing: list[str] = []

    def read_dataset(self) -> None:
        """The page of a dataset's current version."""
        manifest = open_dataset(self._store, self._target.name)
        self.parts["version"] = manifest.fingerprint
        self._add(
            "data_card", "the data card", lambda: read_data_card(self._store, self._target.name, manifest)
        )

    def read_model(self) -> None:
        """The page of a bundle."""
        assert self._target.bundle is not None
        bundle = peek_bundle(self._store, self._target.bundle)
        metrics = self._read("its metrics", lambda: bundle.read_json(METRICS_FILE)) or {}
        self.parts["report"] = metrics
        self._add("model", "what the model is", lambda: show_model(self._store.root_uri, str(bundle.ref)))
        model: ModelDescription | None = self.parts.get("model")
        if model is not None:
            self.parts["version"] = version_of_model(model.aliases)
        self._add_results({"ensemble": str(bundle.ref), **metrics})
        self._add("lineage", "the lineage", lambda: lineage_of_bundle(self._store, bundle.ref))
        self._add("retrains", "the retrainings", lambda: self._retrains(bundle))

    def read_run(self) -> None:
        """The page of a run, finished or not."""
        run_id = self._target.name
        self._add("run", "the run's state", lambda: show_run(self._store, run_id))
        run: RunDescription | None = self.parts.get("run")
        self.parts["version"] = version_of_run(None if run is None else run.state)
        folder = RunFolder(self._store, run_id)
        record = folder.record()
        assert record is not None
        report = self._read("its report", lambda: read_json(self._store, folder.key("report.json"))) or {}
        self.parts["report"] = report
        self._add_results({**report, **({} if "run" in report else {"run": run_id})})
        manifest = self._read("what it published", lambda: read_manifest(folder))
        if manifest is not None:
            self._add("slices", "the slices", lambda: summarise_slices(manifest.slices))
            self._add("rejects", "the rejects", lambda: summarise_rejects(folder, manifest))
        name, fingerprint = dataset_of_run(record)
        if name and fingerprint:
            self._add("data_card", "the data card", lambda: self._data_card(name, fingerprint))
            self._add("sheet", "the augmentation sheet", lambda: read_sheet(self._store, record, fingerprint))
        self._add("lineage", "the lineage", lambda: lineage_of_run(self._store, record))

    def _add_results(self, report: dict[str, Any]) -> None:
        """What the report of a run or of a bundle says of a model's worth, and the predictions behind it."""
        measured = report.get("evaluation") or report
        evaluation = self._parsed(Evaluation, measured, mark="per_class", words="the evaluation")
        inspection = self._parsed(InspectionReport, report, mark="figures", words="the inspection")
        self.parts |= {
            "evaluation": evaluation,
            "committee": self._parsed(CommitteeParts, measured, mark="crops", words="members and cost")
            if evaluation
            else None,
            "ensemble": self._parsed(EnsembleReport, report, mark="gain_interval", words="the ensemble"),
            "trials": list(report.get("trials") or ()) if "ensemble" in report else [],
            "advice": self._parsed(AdviceReport, report, mark="similarity", words="the advice"),
            "inspection": inspection,
        }
        epochs = report.get("history") or ()
        self._add("history", "the epochs", lambda: [EpochResult.model_validate(one) for one in epochs])
        if inspection is not None:
            self._add("pictures", "the pictures", lambda: read_pictures(self._store, inspection))
        run_id = evaluation.run if evaluation is not None else report.get("run")
        if isinstance(run_id, str):
            self._add("predictions", "the predictions", lambda: self._predictions(run_id, evaluation))
            self._add("subgroups", "parts of the data", lambda: self._subgroups(run_id))

    def _predictions(self, run_id: str, evaluation: Evaluation | None) -> PredictionSummary | None:
        folder = RunFolder(self._store, run_id)
        record, manifest = folder.record(), read_manifest(folder)
        if record is None or manifest is None:
            if evaluation is not None:
                self.missing.append(f"the rows of the evaluation: run {run_id} is not in the workspace")
            return None
        if not _has_predictions(manifest):
            return None
        rule = read_rule(record.config)
        classes = () if evaluation is None else evaluation.classes
        are_probabilities = record.settings.get(GIVES_PROBABILITIES, True)
        return summarise_predictions(
            folder, manifest, rule, classes=classes, are_probabilities=are_probabilities
        )

    def _subgroups(self, run_id: str) -> list[Subgroup]:
        folder = RunFolder(self._store, run_id)
        manifest = read_manifest(folder)
        if manifest is None or not _has_predictions(manifest):
            return []
        return summarise_subgroups(folder, manifest)

    def _data_card(self, name: str, fingerprint: str) -> DataCard:
        return read_data_card(self._store, name, open_dataset(self._store, name, fingerprint))

    def _retrains(self, bundle: Bundle) -> list[RetrainReport]:
        folder = RetrainFolder(self._store, bundle.ref.name)
        decisions = [folder.decision(date) for date in folder.decided_dates()]
        return [RetrainReport.model_validate(one) for one in decisions if one is not None]

    def _parsed(
        self, model: type[ModelT], document: dict[str, Any], *, mark: str, words: str
    ) -> ModelT | None:
        """The fields of a model that a document has; None for one without `mark`, which is that of something else."""
        if mark not in document:
            return None
        fields = {name: value for name, value in document.items() if name in model.model_fields}
        return self._read(words, lambda: model.model_validate(fields))

    def _add(self, part: str, words: str, read: Callable[[], object]) -> None:
        found = self._read(words, read)
        if found is not None:
            self.parts[part] = found

    def _read(self, words: str, read: Callable[[], PartT]) -> PartT | None:
        self._progress.stage(f"reading {words}")
        try:
            return read()
        except (ConvoyError, ValidationError, OSError) as error:
            self.missing.append(f"{words}: {_what(error)}")
            return None


def _what(error: ConvoyError | ValidationError | OSError) -> str:
    if isinstance(error, ConvoyError):
        return error.what
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        return f"{error.error_count()} of its fields are missing or others, first {field}: {first['msg']}"
    return str(error)


def _has_predictions(manifest: RunManifest) -> bool:
    outputs = (output for record in manifest.slices for output in record.parts)
    return any(output.startswith(PREDICTIONS) for output in outputs)
