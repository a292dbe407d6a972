"""What an ensemble is worth on rows that chose nothing: those of `test`, or of `val` by cross-fitting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from convoy.core.config import StrictModel
from convoy.core.crop_policies import CropPlan, CropPolicy, EvaluationMode, MemberOutputs, view_indices
from convoy.core.large_arrays import large_array, large_take
from convoy.core.metrics import EvaluationCounts, ReliabilityBin
from convoy.core.progress import Progress
from convoy.core.records import Split
from convoy.core.statistics import (
    Interval,
    McNemarResult,
    bootstrap_difference,
    mcnemar_test,
    wilson_interval,
)
from convoy.pipelines.committee_evaluation import CommitteeEvaluation, evaluate_committee
from convoy.pipelines.committees import CommitteeRecord
from convoy.pipelines.ensemble_candidates import paired_rows, read_predictions
from convoy.pipelines.ensemble_choice import (
    CandidatePredictions,
    Choice,
    EnsembleChooser,
    EnsembleSettings,
)
from convoy.pipelines.ensemble_gate import CrossFittedGates, GateOutcome
from convoy.pipelines.feature_plan import ExtractionConfig
from convoy.pipelines.prediction_request import PredictionRequest
from convoy.storage.manifests import Manifest
from convoy.storage.member_predictions import MemberLogits
from convoy.storage.object_store import ObjectStore
from convoy.storage.runs import RunFolder
from convoy.vision.ensembling import Floats, joint_logits, member_values
from convoy.vision.gate_calibration import GateCalibration

_NUM_FOLDS = 5


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


class CropWorth(StrictModel):
    """The chosen members at other crops, on the reported rows.

    `top1_interval` is Wilson's, `gain` is over the best single member at the same crops, with its 95 % paired bootstrap
    interval; reports of before have none. `images_per_s` is estimated as on the front.
    """

    crops: CropPolicy
    top1: float
    best_single_top1: float
    passes_per_image: int
    images_per_s: float | None = None
    top1_interval: Interval | None = None
    gain: Interval | None = None


class SizeWorth(StrictModel):
    """The members with the largest weights alone, at the chosen crops, on the reported rows; intervals as of crops."""

    num_members: int
    top1: float
    passes_per_image: int
    top1_interval: Interval | None = None
    gain: Interval | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Measured:
    """All figures on rows that chose nothing; reliability is that before and after the temperature of the whole.

    Without a test split there are no figures of other crops and sizes, since each fold may choose its own; `gates` are
    then what gates hold, by the agreement that is asked of them, if a gate is asked for.
    """

    gain: Gain
    reliability_before: list[ReliabilityBin]
    reliability_after: list[ReliabilityBin]
    by_crops: list[CropWorth]
    by_size: list[SizeWorth]
    evaluation: CommitteeEvaluation | None
    gates: dict[float, GateOutcome] = field(default_factory=dict)


class UntouchedRows:
    """An ensemble and its best single member, another committee, on the labelled rows of `test`."""

    def __init__(
        self,
        store: ObjectStore,
        manifest: Manifest,
        committee: CommitteeRecord,
        single: CommitteeRecord,
        *,
        dataset: str,
        extraction: ExtractionConfig,
        progress: Progress,
    ) -> None:
        self._store, self._manifest, self._progress = store, manifest, progress
        self._dataset, self._extraction = dataset, extraction
        self._committee, self._single = committee, single
        self._evaluation = self._evaluate(committee)
        ensemble = self._kept(self._evaluation)
        digests = [member.digest for member in committee.members]
        if all(member.digest in digests for member in single.members):
            places = [digests.index(member.digest) for member in single.members]
            alone = replace(ensemble, logits_MVNK=large_take(ensemble.logits_MVNK, places))
        else:
            alone = self._kept(self._evaluate(single))
        _, (rows, rows_alone) = paired_rows([ensemble.sample_ids, alone.sample_ids])
        self.labels_N = ensemble.labels_N[rows]
        self.logits_MVNK = _taken(ensemble.logits_MVNK, rows)
        # Another committee may have its classes in another order: labels go with the logits.
        self._alone_labels_N = alone.labels_N[rows_alone]
        self._alone_1VNK = _taken(alone.logits_MVNK, rows_alone)

    def measured(self) -> Measured:
        """The figures of these rows."""
        views = range(self.logits_MVNK.shape[1])
        joint_NK = _joint_logits(self._committee, self.logits_MVNK, views)
        return Measured(
            gain=_gain("test", self._is_right(joint_NK), self._is_single_right(views)),
            reliability_before=_reliability(joint_NK, self.labels_N),
            reliability_after=_reliability(joint_NK / self._committee.temperature, self.labels_N),
            by_crops=self._by_crops(),
            by_size=self._by_size(views),
            evaluation=self._evaluation,
        )

    def _by_crops(self) -> list[CropWorth]:
        """Every policy whose views the committee's crops hold."""
        found = []
        for policy in CropPolicy:
            if (views := view_indices(policy, self._committee.plan)) is None:
                continue
            is_right_N = self._is_right(_joint_logits(self._committee, self.logits_MVNK, views))
            is_single_right_N = self._is_single_right(views)
            found.append(
                CropWorth(
                    crops=policy,
                    top1=float(is_right_N.mean()),
                    best_single_top1=float(is_single_right_N.mean()),
                    passes_per_image=len(views) * len(self._committee.members),
                    top1_interval=_top1_interval(is_right_N),
                    gain=bootstrap_difference(is_right_N, is_single_right_N),
                )
            )
        return found

    def _by_size(self, views: Sequence[int]) -> list[SizeWorth]:
        committee = self._committee
        by_weight = sorted(range(len(committee.members)), key=lambda place: -committee.members[place].weight)
        is_single_right_N = self._is_single_right(views)
        found = []
        for size in range(1, len(by_weight) + 1):
            places = by_weight[:size]
            largest = replace(committee, members=tuple(committee.members[place] for place in places))
            is_right_N = self._is_right(_joint_logits(largest, large_take(self.logits_MVNK, places), views))
            found.append(
                SizeWorth(
                    num_members=size,
                    top1=float(is_right_N.mean()),
                    passes_per_image=size * len(views),
                    top1_interval=_top1_interval(is_right_N),
                    gain=bootstrap_difference(is_right_N, is_single_right_N),
                )
            )
        return found

    def _is_right(self, joint_NK: Floats) -> NDArray[np.bool_]:
        return np.asarray(joint_NK.argmax(axis=1) == self.labels_N)

    def _is_single_right(self, views: Sequence[int]) -> NDArray[np.bool_]:
        joint_NK = _joint_logits(self._single, self._alone_1VNK, views)
        return np.asarray(joint_NK.argmax(axis=1) == self._alone_labels_N)

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
        return read_predictions(RunFolder(self._store, evaluation.run))


def cross_fitted(predictions: CandidatePredictions, settings: EnsembleSettings) -> Measured:
    """Each fold of the validation rows is predicted by an ensemble, and a single member, chosen on the others."""
    num_rows, num_classes = len(predictions.labels_N), predictions.logits_MVNK.shape[3]
    fold_N = np.random.default_rng(settings.seed).permutation(num_rows) % _NUM_FOLDS
    joint_NK, tempered_NK = np.zeros((num_rows, num_classes)), np.zeros((num_rows, num_classes))
    single_NK = np.zeros((num_rows, num_classes))
    gates = None if settings.gate is None else CrossFittedGates(settings.gate)
    for fold in range(_NUM_FOLDS):
        held_out = np.flatnonzero(fold_N == fold)
        seen = _rows_of(predictions, np.flatnonzero(fold_N != fold))
        unseen = _rows_of(predictions, held_out)
        chooser = EnsembleChooser(seen, settings)
        choice = chooser.choose()
        voting = [*choice.point.members, choice.best_single]
        temperatures_M = chooser.temperatures(choice.point.crops)
        values_MNK = member_values(
            large_take(unseen.logits_MVNK, voting),
            view_indices(choice.point.crops, predictions.plan) or (),
            settings.averaging,
            [temperatures_M[member] for member in voting],
        )
        joint_NK[held_out] = joint_logits(values_MNK[:-1], choice.point.weights, settings.averaging)
        tempered_NK[held_out] = joint_NK[held_out] / choice.temperature
        single_NK[held_out] = values_MNK[-1]
        # Of fewer rows than folds some hold none.
        if gates is not None and len(held_out):
            gates.add(
                _gate_calibration(seen.logits_MVNK, choice, predictions.plan, settings),
                _gate_calibration(unseen.logits_MVNK, choice, predictions.plan, settings),
                is_exact_right_N=joint_NK[held_out].argmax(axis=1) == unseen.labels_N,
                labels_N=unseen.labels_N,
            )
    labels_N = predictions.labels_N
    return Measured(
        gain=_gain(
            _cross_fitted_rows(predictions),
            joint_NK.argmax(axis=1) == labels_N,
            single_NK.argmax(axis=1) == labels_N,
        ),
        reliability_before=_reliability(joint_NK, labels_N),
        reliability_after=_reliability(tempered_NK, labels_N),
        by_crops=[],
        by_size=[],
        evaluation=None,
        gates={} if gates is None else gates.outcomes(),
    )


def _cross_fitted_rows(predictions: CandidatePredictions) -> str:
    """What the rows are called. Of folds they are training rows, each by models that did not see it."""
    has_folds = any(count > 1 for count in predictions.num_networks_M)
    return "train, out of fold, cross-fitted" if has_folds else "val, cross-fitted"


def _gate_calibration(
    logits_MVNK: NDArray[np.float32], choice: Choice, plan: CropPlan, settings: EnsembleSettings
) -> GateCalibration:
    """The chosen ensemble on some rows, of which there are the outputs of all candidates in the views of a plan."""
    point = choice.point
    views = list(view_indices(point.crops, plan) or ())
    return GateCalibration(
        large_take(logits_MVNK, point.members, views),
        weights_M=point.weights,
        temperatures_M=choice.temperatures_M,
        averaging=settings.averaging,
        plan=CropPlan(policy=point.crops, multiscale=plan.multiscale),
    )


def _rows_of(predictions: CandidatePredictions, rows: NDArray[np.int64]) -> CandidatePredictions:
    """Some rows of all candidates, on disk where memory is short."""
    return replace(
        predictions,
        logits_MVNK=_taken(predictions.logits_MVNK, rows),
        labels_N=predictions.labels_N[rows],
    )


def _taken(logits_MVNK: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Some rows, on disk where memory is short."""
    num_members, num_views, _, num_classes = logits_MVNK.shape
    taken_MVNK = large_array((num_members, num_views, len(rows), num_classes), np.float32)
    for place in np.ndindex(num_members, num_views):
        taken_MVNK[place] = logits_MVNK[place][rows]
    return taken_MVNK


def _joint_logits(
    committee: CommitteeRecord, logits_MVNK: NDArray[np.float32], views: Sequence[int]
) -> Floats:
    """The joint logits of a committee's members before the temperature of the whole; weights count relatively."""
    temperatures = [member.temperature for member in committee.members]
    weights_M = np.array([member.weight for member in committee.members])
    values_MNK = member_values(logits_MVNK, views, committee.averaging, temperatures)
    return joint_logits(values_MNK, weights_M / weights_M.sum(), committee.averaging)


def _top1_interval(is_right_N: NDArray[np.bool_]) -> Interval:
    return wilson_interval(int(is_right_N.sum()), len(is_right_N))


def _gain(rows: str, ensemble_N: NDArray[np.bool_], single_N: NDArray[np.bool_]) -> Gain:
    return Gain(
        rows=rows,
        num_rows=len(ensemble_N),
        top1=float(ensemble_N.mean()),
        best_single_top1=float(single_N.mean()),
        difference=bootstrap_difference(ensemble_N, single_N),
        mcnemar=mcnemar_test(ensemble_N, single_N),
    )


def _reliability(logits_NK: Floats, labels_N: NDArray[np.int32]) -> list[ReliabilityBin]:
    counts = EvaluationCounts(logits_NK.shape[1])
    counts.add(logits_NK, labels_N)
    return list(counts.summary().reliability)
