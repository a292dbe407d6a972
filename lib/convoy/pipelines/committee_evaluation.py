"""What a committee is worth on labelled rows: the joint output, each member alone, and what the crops cost."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from pydantic import Field

from convoy.core.config import StrictModel
from convoy.core.crop_policies import (
    Averaging,
    CropPlan,
    CropPolicy,
    EvaluationMode,
    MemberOutputs,
    crop_views,
)
from convoy.core.errors import ErrorBudgetExceeded
from convoy.core.metrics import EvaluationCounts
from convoy.core.progress import Progress
from convoy.core.records import Split
from convoy.core.statistics import Interval, wilson_interval
from convoy.pipelines.committee_predictions import CommitteeJob, CommitteePredictions
from convoy.pipelines.committees import CommitteeMember, CommitteeRecord
from convoy.pipelines.evaluation import Evaluation, measure_predictions, require_labels
from convoy.pipelines.prediction_request import PredictionRequest
from convoy.storage.commits import RunManifest
from convoy.storage.manifests import Manifest
from convoy.storage.member_predictions import iter_member_parts
from convoy.storage.object_store import ObjectStore
from convoy.storage.predictions import paired, read_predicted
from convoy.vision.committee_options import gate_costs
from convoy.vision.ensembling import mean_of_views
from convoy.vision.presets import CropGeometry, geometry_of

# Policies whose crops all are the central one, plain or mirrored, where an image is no larger; and what shows as much.
_SAME_WITHOUT_MARGIN = {CropPolicy.FIVE: CropPolicy.CENTER, CropPolicy.TEN: CropPolicy.FLIP}


class MemberEvaluation(StrictModel):
    """A member alone, over the same crops and rows as the committee; `top1_interval` is Wilson's, 95 %."""

    name: str
    digest: str
    weight: float
    temperature: float
    top1: float
    nll: float | None
    top1_interval: Interval


class CommitteeCost(StrictModel):
    """What one image costs: passes through networks, multiply-adds, and what the members take in memory.

    `images_per_s` is the steady rate at which the run was computed, with all of its workers.
    """

    passes_per_image: float
    macs_per_image: int
    num_parameters: int
    parameter_bytes: int
    images_per_s: float | None


class ModeEffect(StrictModel):
    """A cheaper mode against the exact one on the same rows.

    `agreement` is the share of samples with the same predicted class; `top1_change` is the cheaper mode's top-1
    less the exact one's; `speedup` is the ratio of network passes, `macs_ratio` that of their multiply-adds, as members
    differ in what a pass of them costs, and a dense one is of a larger image; reports of before have none.
    """

    agreement: float
    top1_change: float
    exact_top1: float
    exact_run: str
    speedup: float
    macs_ratio: float | None = None


class CommitteeEvaluation(Evaluation):
    """The evaluation of a committee. `members` is empty in the gated mode, where not every member saw every image.

    Of the rejects `unfetched` could not be fetched, which a later run may; `notes` say how, and which crops show
    nothing new.
    """

    crops: CropPolicy
    averaging: Averaging
    mode: EvaluationMode
    members: list[MemberEvaluation]
    cost: CommitteeCost
    effect: ModeEffect | None
    unfetched: int = 0
    notes: list[str] = Field(default_factory=list)


def evaluate_committee(
    store: ObjectStore,
    manifest: Manifest,
    request: PredictionRequest,
    *,
    progress: Progress,
    config: dict[str, Any],
    new_run: bool = False,
) -> CommitteeEvaluation:
    """Predictions where they are missing, and the metrics of the labelled ones; cheaper modes beside the exact one.

    The folder of a run that ends now says all of it too.
    """
    splits = request.split_names(manifest)
    require_labels(manifest, splits)

    def measured(job: CommitteeJob, request: PredictionRequest, exact: _Measured | None) -> _Measured:
        measuring = _Measuring(store, request, splits, exact)
        predictions = job.ensure(
            progress=progress, config=config, new_run=new_run, describe=measuring.describe
        )
        progress.stage("measuring")
        return _Measured(request, predictions, measuring.of(predictions))

    # Refuses what cannot be, before the exact mode computes for an hour.
    job, exact = CommitteeJob(store, manifest, request), None
    if request.mode is not EvaluationMode.EXACT:
        exact_request = request.in_mode(EvaluationMode.EXACT)
        exact = measured(CommitteeJob(store, manifest, exact_request), exact_request, None)
    return measured(job, request, exact).evaluation


class _Measured(NamedTuple):
    """A request, its predictions, and what they are worth."""

    request: PredictionRequest
    predictions: CommitteePredictions
    evaluation: CommitteeEvaluation


class _Measuring:
    """What the predictions of a request are worth: measured once, for the run's folder and for whoever asked."""

    def __init__(
        self,
        store: ObjectStore,
        request: PredictionRequest,
        splits: Collection[Split],
        exact: _Measured | None,
    ) -> None:
        self._store, self._request, self._splits, self._exact = store, request, splits, exact
        self._known: dict[str, CommitteeEvaluation] = {}

    def describe(self, predictions: CommitteePredictions) -> dict[str, Any]:
        """What the folder of a run says of it."""
        try:
            evaluation = self.of(predictions)
        except ErrorBudgetExceeded:
            # Whoever asked is told; the run is whole, and would otherwise be gone on with for ever.
            return predictions.report()
        return predictions.report() | evaluation.model_dump(mode="json")

    def of(self, predictions: CommitteePredictions) -> CommitteeEvaluation:
        """The whole evaluation; ErrorBudgetExceeded where no labelled sample has a result."""
        if predictions.run_id not in self._known:
            self._known[predictions.run_id] = self._measure(predictions)
        return self._known[predictions.run_id]

    def _measure(self, predictions: CommitteePredictions) -> CommitteeEvaluation:
        request, committee = self._request, self._request.committee
        evaluation = measure_predictions(
            self._store,
            predictions.manifest,
            classes=committee.classes,
            gives_probabilities=committee.gives_probabilities,
            splits=self._splits,
            model_digest=committee.digest,
        )
        return CommitteeEvaluation(
            **evaluation.model_dump(),
            crops=request.plan.policy,
            averaging=committee.averaging,
            mode=request.mode,
            members=evaluate_members(self._store, committee, predictions),
            cost=_cost(request, predictions),
            effect=self._effect(predictions, evaluation.top1),
            unfetched=predictions.unfetched,
            notes=[*predictions.fetch_notes(), *crop_notes(request)],
        )

    def _effect(self, predictions: CommitteePredictions, top1: float) -> ModeEffect | None:
        exact = self._exact
        if exact is None:
            return None
        return ModeEffect(
            agreement=_agreement(self._store, predictions.manifest, exact.predictions.manifest),
            top1_change=top1 - exact.evaluation.top1,
            exact_top1=exact.evaluation.top1,
            exact_run=exact.predictions.run_id,
            speedup=_passes(exact.request, exact.predictions) / _passes(self._request, predictions),
            macs_ratio=_macs(exact.request, exact.predictions) / _macs(self._request, predictions),
        )


def crop_notes(request: PredictionRequest) -> list[str]:
    """Of crops that cost passes and show nothing new, as presets leave nothing beside the central one."""
    cheaper = _SAME_WITHOUT_MARGIN.get(request.plan.policy)
    if cheaper is None:
        return []
    num_views, num_cheaper = (len(crop_views(plan)) for plan in (request.plan, CropPlan(policy=cheaper)))
    geometries = dict.fromkeys(geometry_of(request.preset(member)) for member in request.committee.members)
    return [
        f"crops {request.plan.policy} of {_all_crop(geometry)} images show what {cheaper} shows, in {num_views} passes"
        f" a member in place of {num_cheaper}: the preset leaves nothing beside its crop of {geometry.crop_px} pixels"
        for geometry in geometries
        if (geometry.resize_px or geometry.crop_px) <= geometry.crop_px
    ]


def _all_crop(geometry: CropGeometry) -> str:
    """The images that the central crop of such a preset shows entirely."""
    return "square" if geometry.resize_px else f"{geometry.crop_px}x{geometry.crop_px}"


def evaluate_members(
    store: ObjectStore, committee: CommitteeRecord, predictions: CommitteePredictions
) -> list[MemberEvaluation]:
    """Each member alone, from what was kept of it, a part at a time."""
    if predictions.keep is MemberOutputs.NONE:
        return []
    counts = [EvaluationCounts(len(committee.classes)) for _ in committee.members]
    for part in iter_member_parts(store, predictions.manifest):
        if predictions.keep is MemberOutputs.VIEWS:
            temperature = committee.members[part.member].temperature
            logits_NK = mean_of_views(part.logits_VNK, committee.averaging, temperature)
        else:
            logits_NK = part.logits_VNK[0]
        counts[part.member].add(logits_NK, part.labels_N)
    return [_alone(member, count) for member, count in zip(committee.members, counts, strict=True)]


def _alone(member: CommitteeMember, counts: EvaluationCounts) -> MemberEvaluation:
    metrics = counts.summary()
    return MemberEvaluation(
        name=member.name,
        digest=member.digest,
        weight=member.weight,
        temperature=member.temperature,
        top1=metrics.top1,
        nll=metrics.nll if member.classifier.gives_probabilities else None,
        top1_interval=wilson_interval(int(counts.confusion_KK.diagonal().sum()), metrics.num_rows),
    )


def _cost(request: PredictionRequest, predictions: CommitteePredictions) -> CommitteeCost:
    backbones = [member.classifier.backbone for member in request.committee.members]
    num_parameters = sum(backbone.num_parameters for backbone in backbones)
    return CommitteeCost(
        passes_per_image=_passes(request, predictions),
        macs_per_image=round(_macs(request, predictions)),
        num_parameters=num_parameters,
        parameter_bytes=4 * num_parameters,
        images_per_s=predictions.images_per_s,
    )


def _passes(request: PredictionRequest, predictions: CommitteePredictions) -> float:
    """Network passes an image, on average."""
    return _mean_cost(request, predictions, [1] * len(request.committee.members))


def _macs(request: PredictionRequest, predictions: CommitteePredictions) -> float:
    """Multiply-adds an image, on average: those of a pass grow with the area that it sees."""
    macs_M = []
    for member in request.committee.members:
        classifier = member.classifier
        scale = request.preset(member).crop_px / classifier.backbone.preset.crop_px
        macs_M.append(round(classifier.macs * scale**2))
    return _mean_cost(request, predictions, macs_M)


def _mean_cost(
    request: PredictionRequest, predictions: CommitteePredictions, costs_M: Sequence[int]
) -> float:
    """What an image costs on average, where a pass of each member costs so much."""
    gate = request.committee.gate
    if request.mode is not EvaluationMode.GATED or gate is None:
        return float(sum(costs_M) * len(crop_views(request.plan)))
    costs = gate_costs(gate, request.plan, costs_M)
    num_rows = {stage: predictions.flags.get(stage.value, 0) for stage in costs}
    return sum(costs[stage] * num_rows[stage] for stage in costs) / max(sum(num_rows.values()), 1)


def _agreement(store: ObjectStore, first: RunManifest, second: RunManifest) -> float:
    """The share of samples with the same predicted class, among those that both predicted."""
    one, other = paired(read_predicted(store, first, "pred"), read_predicted(store, second, "pred"))
    return float((one["pred"].to_numpy() == other["pred"].to_numpy()).mean())
