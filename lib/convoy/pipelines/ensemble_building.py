"""Candidates' validation predictions → the best ensemble under a budget → its worth on untouched rows → bundle.

Members, weights, crops, temperatures and gate are chosen on `val`; the gain over the best single member is measured
on `test`, or without one by cross-fitting on `val`: never on rows that chose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from convoy.core.config import StrictModel
from convoy.core.crop_policies import CropPlan, CropPolicy, EvaluationMode, MemberOutputs, view_indices
from convoy.core.errors import ConfigError, DataError
from convoy.core.metrics import EvaluationCounts, ReliabilityBin
from convoy.core.progress import Progress
from convoy.core.records import Split
from convoy.core.statistics import Interval, McNemarResult, bootstrap_difference, mcnemar_test
from convoy.pipelines.committee_evaluation import CommitteeEvaluation, MemberEvaluation, evaluate_committee
from convoy.pipelines.committee_predictions import PredictionRequest
from convoy.pipelines.committees import (
    CommitteeMember,
    CommitteeRecord,
    committee_of,
    open_committee,
    write_ensemble,
)
from convoy.pipelines.ensemble_choice import (
    CandidatePredictions,
    Choice,
    EnsembleChooser,
    EnsembleSettings,
    FrontPoint,
)
from convoy.pipelines.feature_plan import ExtractionConfig
from convoy.storage.bundles import ModelCard, model_card
from convoy.storage.commits import read_manifest
from convoy.storage.manifests import Manifest
from convoy.storage.member_predictions import MemberLogits, read_member_logits
from convoy.storage.object_store import ObjectStore
from convoy.storage.runs import RunFolder, require_run
from convoy.vision.committee_options import GateOptions
from convoy.vision.ensembling import error_overlap, joint_logits, member_values
from convoy.vision.gate_calibration import GateCalibration

_NUM_FOLDS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A bundle that may become a member, the run with its validation predictions, and what a pass of it takes."""

    bundle: str
    predictions_run: str
    seconds_per_pass: float


class Gain(StrictModel):
    """The ensemble against its best single member, on the same rows at the same crops.

    `rows` says which: those of `test`, or of `val` where each was predicted by an ensemble that was chosen without
    it. `difference` is the ensemble's top-1 less the single member's, with its 95 % paired bootstrap interval.
    """

    rows: str
    num_rows: int
    top1: float
    best_single_top1: float
    difference: Interval
    mcnemar: McNemarResult


class GateReport(StrictModel):
    """The gate, and what it holds on the validation rows that calibrated it; `speedup` is in network passes."""

    gate: GateOptions
    target_agreement: float
    val_agreement: float
    val_passes_per_image: float
    speedup: float


class CropWorth(StrictModel):
    """The chosen members at other crops, on the reported rows."""

    crops: CropPolicy
    top1: float
    best_single_top1: float
    passes_per_image: int


class EnsembleReport(StrictModel):
    """What was built. `front` are all points that were compared on `val`, from the cheapest to the dearest.

    `overlap` says of each two candidates which share of the rows that either gets wrong both get wrong, on `val`.
    """

    ensemble: str
    best_single: str
    gain: float
    gain_interval: Interval
    measured: Gain
    members: list[MemberEvaluation]
    crops: CropPolicy
    temperature: float
    chosen: FrontPoint
    front: list[FrontPoint]
    candidates: list[str]
    overlap: list[list[float]]
    by_crops: list[CropWorth]
    gate: GateReport | None
    evaluation: CommitteeEvaluation | None
    reliability_before: list[ReliabilityBin]
    reliability_after: list[ReliabilityBin]


# Makes the HTML page of a report.
ReportDrawer = Callable[[EnsembleReport], bytes]


def build_ensemble(
    store: ObjectStore,
    manifest: Manifest,
    candidates: Sequence[Candidate],
    settings: EnsembleSettings,
    *,
    name: str,
    dataset: str,
    extraction: ExtractionConfig,
    progress: Progress,
) -> EnsembleReport:
    """Choose, calibrate, measure and store an ensemble.

    Raises DataError for predictions of other rows than the dataset's validation rows, ConfigError for a budget that
    not even the cheapest candidate keeps.
    """
    progress.stage("choosing the ensemble")
    predictions, members = _read_candidates(store, manifest, candidates)
    chooser = EnsembleChooser(predictions, settings)
    choice = chooser.choose()
    committee = _committee(choice, members, predictions, settings)
    gate = None
    if settings.gate is not None:
        gate = _calibrated(choice, committee, predictions, settings.gate)
        committee = replace(committee, gate=gate.gate)
    single = committee_of([members[choice.best_single]], plan=committee.plan, averaging=committee.averaging)
    evaluation: CommitteeEvaluation | None = None
    by_crops: list[CropWorth] = []
    if Split.TEST in manifest.counts:
        test = _TestRows(store, manifest, committee, single, dataset, extraction, progress)
        evaluation, measured, by_crops = test.evaluation, test.gain(), test.by_crops()
    else:
        progress.stage("measuring by cross-fitting")
        measured = _cross_fitted(predictions, settings)
    before, after = _reliability(chooser, choice, predictions, settings)
    report = EnsembleReport(
        ensemble="",
        best_single=members[choice.best_single].name,
        gain=measured.difference.estimate,
        gain_interval=measured.difference,
        measured=measured,
        members=[] if evaluation is None else evaluation.members,
        crops=choice.point.crops,
        temperature=choice.temperature,
        chosen=choice.point,
        front=choice.front,
        candidates=[member.name for member in members],
        overlap=error_overlap(chooser.values(choice.point.crops), predictions.labels_N).tolist(),
        by_crops=by_crops,
        gate=gate,
        evaluation=evaluation,
        reliability_before=before,
        reliability_after=after,
    )
    reference = write_ensemble(
        store,
        name,
        committee,
        metrics=report.model_dump(mode="json", exclude={"ensemble"}),
        card=_card(name, dataset, manifest, committee, report),
    )
    return report.model_copy(update={"ensemble": str(reference)})


def _read_candidates(
    store: ObjectStore, manifest: Manifest, candidates: Sequence[Candidate]
) -> tuple[CandidatePredictions, list[CommitteeMember]]:
    """The predictions of all candidates for the rows that all of them predicted, and the candidates as members."""
    members, kept, plans = [], [], []
    for candidate in candidates:
        (member,) = open_committee(store, candidate.bundle).members
        _, record = require_run(store, candidate.predictions_run)
        if record.identity["dataset_fingerprint"] != manifest.fingerprint:
            raise DataError(
                "predictions of another version of the dataset cannot be compared",
                where=f"run {candidate.predictions_run} of {candidate.bundle}",
                next_step="search again on the dataset as it is now",
            )
        run = read_manifest(RunFolder(store, candidate.predictions_run))
        if run is None:
            raise DataError("the run has no published predictions", where=candidate.predictions_run)
        members.append(member)
        plans.append(CropPlan.model_validate(record.identity["crops"]))
        kept.append(_in_order(read_member_logits(store, run), member, members[0]))
    committee_of(members)
    plan = _common_plan(plans)
    ids = reduce(np.intersect1d, [np.asarray(one.sample_ids) for one in kept])
    if not len(ids):
        raise DataError(
            "no validation row was predicted by all candidates", next_step="look at the rejects of their runs"
        )
    rows = [_rows_of(one.sample_ids, ids) for one in kept]
    return CandidatePredictions(
        logits_MVNK=np.stack(
            [
                one.logits_MVNK[0][list(view_indices(plan.policy, its_plan) or ())][:, places]
                for one, its_plan, places in zip(kept, plans, rows, strict=True)
            ]
        ),
        labels_N=kept[0].labels_N[rows[0]],
        plan=plan,
        seconds_per_pass_M=tuple(candidate.seconds_per_pass for candidate in candidates),
        macs_M=tuple(member.classifier.backbone.macs for member in members),
    ), members


def _in_order(logits: MemberLogits, member: CommitteeMember, first: CommitteeMember) -> MemberLogits:
    """Predictions with the classes in the order of the first candidate."""
    classes, wanted = member.classifier.classes, first.classifier.classes
    if classes == wanted or set(classes) != set(wanted):
        return logits
    order = [classes.index(name) for name in wanted]
    place_of = np.array([wanted.index(name) for name in classes])
    return replace(logits, logits_MVNK=logits.logits_MVNK[..., order], labels_N=place_of[logits.labels_N])


def _common_plan(plans: Sequence[CropPlan]) -> CropPlan:
    """The largest crops that all candidates kept."""
    if all(plan == plans[0] for plan in plans):
        return plans[0]
    for policy in (CropPolicy.TEN, CropPolicy.FIVE, CropPolicy.FLIP, CropPolicy.CENTER):
        if all(view_indices(policy, plan) is not None for plan in plans):
            return CropPlan(policy=policy)
    raise ConfigError(
        "the candidates kept no crops in common",
        where=", ".join(plan.policy.value for plan in plans),
        next_step="search again with one policy under `crops`",
    )


def _rows_of(sample_ids: Sequence[str], wanted: NDArray[Any]) -> NDArray[np.int64]:
    """Where each wanted id stands."""
    found = pc.index_in(pa.array(wanted), value_set=pa.array(sample_ids))
    return np.asarray(found.to_numpy(zero_copy_only=False), np.int64)


def _committee(
    choice: Choice,
    members: Sequence[CommitteeMember],
    predictions: CandidatePredictions,
    settings: EnsembleSettings,
) -> CommitteeRecord:
    point = choice.point
    return committee_of(
        [
            replace(members[place], weight=weight, temperature=temperature)
            for place, weight, temperature in zip(
                point.members, point.weights, choice.temperatures_M, strict=True
            )
        ],
        plan=CropPlan(policy=point.crops, multiscale=predictions.plan.multiscale),
        averaging=settings.averaging,
        temperature=choice.temperature,
    )


def _calibrated(
    choice: Choice, committee: CommitteeRecord, predictions: CandidatePredictions, target: float
) -> GateReport:
    views = list(view_indices(committee.plan.policy, predictions.plan) or ())
    calibration = GateCalibration(
        predictions.logits_MVNK[list(choice.point.members)][:, views],
        weights_M=[member.weight for member in committee.members],
        temperatures_M=choice.temperatures_M,
        averaging=committee.averaging,
        plan=committee.plan,
    )
    best = calibration.best_gate(target)
    return GateReport(
        gate=best.gate,
        target_agreement=target,
        val_agreement=best.agreement,
        val_passes_per_image=best.mean_passes,
        speedup=choice.point.passes_per_image / best.mean_passes,
    )


class _TestRows:
    """The ensemble and its best single member on the test split, which chose nothing."""

    def __init__(
        self,
        store: ObjectStore,
        manifest: Manifest,
        committee: CommitteeRecord,
        single: CommitteeRecord,
        dataset: str,
        extraction: ExtractionConfig,
        progress: Progress,
    ) -> None:
        self._store, self._manifest, self._progress = store, manifest, progress
        self._dataset, self._extraction = dataset, extraction
        self._committee, self._single = committee, single
        self.evaluation = self._evaluate(committee)
        self._ensemble_logits = self._kept(self.evaluation)
        digests = [member.digest for member in committee.members]
        wanted = single.members[0].digest
        self._place_of_single = digests.index(wanted) if wanted in digests else 0
        self._single_logits = (
            self._ensemble_logits if wanted in digests else self._kept(self._evaluate(single))
        )

    def gain(self) -> Gain:
        """The paired comparison at the committee's own crops."""
        views = range(self._ensemble_logits.logits_MVNK.shape[1])
        return _compare("test", *self._correct(views))

    def by_crops(self) -> list[CropWorth]:
        """The same members at every policy whose views the committee's crops hold."""
        plan = self._committee.plan
        found = []
        for policy in CropPolicy:
            views = view_indices(policy, plan)
            if views is not None:
                ensemble_N, single_N = self._correct(views)
                found.append(
                    CropWorth(
                        crops=policy,
                        top1=float(ensemble_N.mean()),
                        best_single_top1=float(single_N.mean()),
                        passes_per_image=len(views) * len(self._committee.members),
                    )
                )
        return found

    def _correct(self, views: Sequence[int]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which rows the ensemble and the single member get right, on the rows that both predicted."""
        committee, mine, others = self._committee, self._ensemble_logits, self._single_logits
        ids = np.intersect1d(np.asarray(mine.sample_ids), np.asarray(others.sample_ids))
        my_rows, other_rows = _rows_of(mine.sample_ids, ids), _rows_of(others.sample_ids, ids)
        labels_N = mine.labels_N[my_rows]
        ensemble_N = _predicted(mine.logits_MVNK[:, :, my_rows], views, committee) == labels_N
        place = self._place_of_single
        single_MVNK = others.logits_MVNK[place : place + 1][:, :, other_rows]
        return ensemble_N, _predicted(single_MVNK, views, self._single) == labels_N

    def _evaluate(self, committee: CommitteeRecord) -> CommitteeEvaluation:
        request = PredictionRequest(
            committee=committee,
            dataset=self._dataset,
            splits=(Split.TEST,),
            extraction=self._extraction,
            keep=MemberOutputs.VIEWS,
            mode=EvaluationMode.EXACT,
        )
        config = {"ensemble": [member.name for member in committee.members]}
        return evaluate_committee(
            self._store, self._manifest, request, progress=self._progress, config=config
        )

    def _kept(self, evaluation: CommitteeEvaluation) -> MemberLogits:
        manifest = read_manifest(RunFolder(self._store, evaluation.run))
        if manifest is None:
            raise DataError("the run has no published predictions", where=evaluation.run)
        return read_member_logits(self._store, manifest)


def _predicted(
    logits_MVNK: NDArray[np.float32], views: Sequence[int], committee: CommitteeRecord
) -> NDArray[np.int64]:
    """The classes that a committee predicts from outputs of its members."""
    temperatures = [member.temperature for member in committee.members]
    values_MNK = member_values(logits_MVNK, views, committee.averaging, temperatures)
    weights = [member.weight for member in committee.members]
    return np.asarray(joint_logits(values_MNK, weights, committee.averaging).argmax(axis=1))


def _compare(rows: str, ensemble_N: NDArray[np.bool_], single_N: NDArray[np.bool_]) -> Gain:
    return Gain(
        rows=rows,
        num_rows=len(ensemble_N),
        top1=float(ensemble_N.mean()),
        best_single_top1=float(single_N.mean()),
        difference=bootstrap_difference(ensemble_N, single_N),
        mcnemar=mcnemar_test(ensemble_N, single_N),
    )


def _cross_fitted(predictions: CandidatePredictions, settings: EnsembleSettings) -> Gain:
    """Each fold of the validation rows is predicted by an ensemble, and a single member, chosen on the others."""
    num_rows = len(predictions.labels_N)
    fold_N = np.random.default_rng(settings.seed).permutation(num_rows) % _NUM_FOLDS
    ensemble_N, single_N = np.zeros(num_rows, np.bool_), np.zeros(num_rows, np.bool_)
    for fold in range(_NUM_FOLDS):
        chosen_on, held_out = np.flatnonzero(fold_N != fold), np.flatnonzero(fold_N == fold)
        seen = replace(
            predictions,
            logits_MVNK=predictions.logits_MVNK[:, :, chosen_on],
            labels_N=predictions.labels_N[chosen_on],
        )
        chooser = EnsembleChooser(seen, settings)
        choice = chooser.choose()
        point = choice.point
        views = view_indices(point.crops, predictions.plan) or ()
        unseen = member_values(
            predictions.logits_MVNK[:, :, held_out], views, settings.averaging, chooser.temperatures_M
        )
        labels_N = predictions.labels_N[held_out]
        joint_NK = joint_logits(unseen[list(point.members)], point.weights, settings.averaging)
        ensemble_N[held_out] = joint_NK.argmax(axis=1) == labels_N
        single_N[held_out] = unseen[choice.best_single].argmax(axis=1) == labels_N
    return _compare("val, cross-fitted", ensemble_N, single_N)


def _reliability(
    chooser: EnsembleChooser, choice: Choice, predictions: CandidatePredictions, settings: EnsembleSettings
) -> tuple[list[ReliabilityBin], list[ReliabilityBin]]:
    """The reliability of the joint output on `val`, before and after the temperature of the whole."""
    values_MNK = chooser.values(choice.point.crops)[list(choice.point.members)]
    found = []
    for temperature in (1.0, choice.temperature):
        counts = EvaluationCounts(values_MNK.shape[2])
        joint_NK = joint_logits(values_MNK, choice.point.weights, settings.averaging, temperature)
        counts.add(joint_NK, predictions.labels_N)
        found.append(list(counts.summary().reliability))
    return found[0], found[1]


def _card(
    name: str, dataset: str, manifest: Manifest, committee: CommitteeRecord, report: EnsembleReport
) -> str:
    members = "\n".join(
        f"- `{member.name}`, weight {member.weight:.3f}, temperature {member.temperature:.2f}"
        for member in committee.members
    )
    intervals = (
        report.evaluation.intervals if report.evaluation is not None else {"gain": report.gain_interval}
    )
    card = ModelCard(
        name=name,
        summary=f"An ensemble of {len(committee.members)} networks over the crops `{committee.plan.policy}`,"
        f" averaging {committee.averaging.value}.",
        strategy=members,
        dataset=dataset,
        dataset_fingerprint=manifest.fingerprint,
        split_rows={split.value: counts.num_samples for split, counts in manifest.counts.items()},
        classes=committee.classes,
        split=report.measured.rows,
        metrics=intervals,
        intended_use="Images like those of the dataset above; each member prepares them by its own preset.",
        limits=[
            "Members, weights and crops were chosen on validation rows: their own figures there are optimistic.",
            f"One image costs {report.chosen.passes_per_image} network passes.",
        ],
        lineage={"best single member": report.best_single, "ensemble digest": committee.digest},
    )
    return model_card(card)
