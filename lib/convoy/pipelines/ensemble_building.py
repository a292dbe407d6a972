"""Candidates' validation predictions → the best ensemble under a budget → its worth on untouched rows → bundle.

Members, weights, crops, temperatures and gate are chosen on `val`; the gain over the best single member, and what the
gate holds, is measured on `test`, or without one by cross-fitting on `val`: never on rows that chose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from convoy.core.config import StrictModel
from convoy.core.crop_policies import CropPlan, CropPolicy, view_indices
from convoy.core.large_arrays import large_take
from convoy.core.metrics import ReliabilityBin
from convoy.core.progress import Progress
from convoy.core.records import Split
from convoy.core.statistics import Interval
from convoy.pipelines.committee_evaluation import CommitteeEvaluation, MemberEvaluation
from convoy.pipelines.committees import CommitteeRecord, committee_of, write_ensemble
from convoy.pipelines.ensemble_candidates import Candidate, Networks, read_candidates
from convoy.pipelines.ensemble_choice import (
    CandidatePredictions,
    Choice,
    EnsembleChooser,
    EnsembleSettings,
    FrontPoint,
)
from convoy.pipelines.ensemble_gate import GateReport, calibrate_gate, measure_gate
from convoy.pipelines.ensemble_measuring import (
    CropWorth,
    Gain,
    Measured,
    SizeWorth,
    UntouchedRows,
    cross_fitted,
)
from convoy.pipelines.feature_plan import ExtractionConfig
from convoy.pipelines.training_rows import has_labels
from convoy.storage.bundles import ModelCard, model_card
from convoy.storage.manifests import Manifest
from convoy.storage.object_store import ObjectStore
from convoy.vision.ensembling import error_overlap


class EnsembleReport(StrictModel):
    """What was built. `front` are all points that were compared on `val`, from the cheapest to the dearest.

    `best_single` is the candidate that alone has the highest top-1 on `val`, at the chosen crops.

    `overlap` says of each two candidates which share of the rows that either gets wrong both get wrong, on `val`.
    `members` are measured on `test`, and missing without one. `by_crops`, `by_size` and the reliability before and
    after the temperature of the whole are of the rows that `measured` names. `num_val_rows` are the labelled rows that
    chose, those that all candidates predicted, and `dataset_fingerprint` names the version of the dataset that they are
    of; reports of before do not say.
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
    by_size: list[SizeWorth]
    gate: GateReport | None
    evaluation: CommitteeEvaluation | None
    reliability_before: list[ReliabilityBin]
    reliability_after: list[ReliabilityBin]
    num_val_rows: int | None = None
    dataset_fingerprint: str | None = None

    @property
    def is_cross_fitted(self) -> bool:
        """Whether there was no test split: each row is measured by an ensemble that the others chose."""
        return self.measured.rows != Split.TEST


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
    predictions, networks = read_candidates(store, manifest, candidates, settings.averaging)
    chosen = _choose(predictions, networks, settings)
    if has_labels(manifest, Split.TEST):
        rows = UntouchedRows(
            store,
            manifest,
            chosen.committee,
            chosen.single,
            dataset=dataset,
            extraction=extraction,
            progress=progress,
        )
        measured, gate = rows.measured(), chosen.gate
        if gate is not None:
            exact_top1 = measured.gain.top1
            gate = measure_gate(
                gate, chosen.committee, rows.logits_MVNK, rows.labels_N, exact_top1=exact_top1
            )
    else:
        progress.stage("measuring by cross-fitting")
        measured, gate = cross_fitted(predictions, settings), chosen.gate
        if gate is not None:
            gate = gate.with_cross_fitted(measured.gates)
    names, num_val_rows = [_name(members) for members in networks], len(predictions.labels_N)
    report = _report(chosen, measured, gate, names, num_val_rows, manifest.fingerprint)
    reference = write_ensemble(
        store,
        name,
        chosen.committee,
        metrics=report.model_dump(mode="json", exclude={"ensemble"}),
        card=_card(name, dataset, manifest, chosen.committee, report),
    )
    return report.model_copy(update={"ensemble": str(reference)})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Chosen:
    """All that validation rows decide, and how fast the members would be at each of the kept crops.

    `single` is the best candidate alone, at the crops of the ensemble.
    """

    choice: Choice
    images_per_s: dict[CropPolicy, float]
    committee: CommitteeRecord
    single: CommitteeRecord
    gate: GateReport | None
    overlap: list[list[float]]


def _choose(
    predictions: CandidatePredictions, networks: Sequence[Networks], settings: EnsembleSettings
) -> _Chosen:
    chooser = EnsembleChooser(predictions, settings)
    choice = chooser.choose()
    committee = _committee(choice, networks, predictions, settings)
    gate = None
    if settings.gate is not None:
        views = list(view_indices(committee.plan.policy, predictions.plan) or ())
        logits_MVNK = large_take(predictions.logits_MVNK, choice.point.members, views)
        gate = calibrate_gate(committee, logits_MVNK, settings.gate)
        committee = committee.with_gate(gate.gate)
    temperature = chooser.temperatures(choice.point.crops)[choice.best_single]
    best = [replace(member, temperature=temperature) for member in networks[choice.best_single]]
    return _Chosen(
        choice=choice,
        images_per_s={
            policy: 1 / chooser.seconds_per_image(choice.point.members, policy)
            for policy in CropPolicy
            if view_indices(policy, predictions.plan) is not None
        },
        committee=committee,
        single=committee_of(best, plan=committee.plan, averaging=committee.averaging),
        gate=gate,
        overlap=error_overlap(chooser.values(choice.point.crops), predictions.labels_N).tolist(),
    )


def _committee(
    choice: Choice,
    networks: Sequence[Networks],
    predictions: CandidatePredictions,
    settings: EnsembleSettings,
) -> CommitteeRecord:
    point = choice.point
    return committee_of(
        [
            replace(member, weight=weight / len(networks[place]), temperature=temperature)
            for place, weight, temperature in zip(
                point.members, point.weights, choice.temperatures_M, strict=True
            )
            for member in networks[place]
        ],
        plan=CropPlan(policy=point.crops, multiscale=predictions.plan.multiscale),
        averaging=settings.averaging,
        temperature=choice.temperature,
    )


def _name(networks: Networks) -> str:
    """A candidate's name in the report: its bundle, or the first of its folds."""
    more = f" and {len(networks) - 1} more folds" if networks[1:] else ""
    return f"{networks[0].name}{more}"


def _report(
    chosen: _Chosen,
    measured: Measured,
    gate: GateReport | None,
    candidates: list[str],
    num_val_rows: int,
    fingerprint: str,
) -> EnsembleReport:
    """The report of an ensemble that is not stored yet and so has no reference."""
    choice, evaluation = chosen.choice, measured.evaluation
    return EnsembleReport(
        ensemble="",
        best_single=candidates[choice.best_single],
        gain=measured.gain.difference.estimate,
        gain_interval=measured.gain.difference,
        measured=measured.gain,
        members=[] if evaluation is None else evaluation.members,
        crops=choice.point.crops,
        temperature=choice.temperature,
        chosen=choice.point,
        front=choice.front,
        candidates=candidates,
        overlap=chosen.overlap,
        by_crops=[
            row.model_copy(update={"images_per_s": chosen.images_per_s.get(row.crops)})
            for row in measured.by_crops
        ],
        by_size=measured.by_size,
        gate=gate,
        evaluation=evaluation,
        reliability_before=measured.reliability_before,
        reliability_after=measured.reliability_after,
        num_val_rows=num_val_rows,
        dataset_fingerprint=fingerprint,
    )


def _limits(report: EnsembleReport, *, has_folds: bool) -> Iterator[str]:
    """What else the figures do not say."""
    if report.is_cross_fitted:
        yield "There was no test split: single models may have been chosen by the rows that measure."
    if has_folds:
        yield (
            "Temperatures were fitted where each row was predicted by one network of k; all k together are less sure"
            " than they are right."
        )


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
            *_limits(report, has_folds=len(committee.members) > len(report.chosen.members)),
        ],
        lineage={"best single member": report.best_single, "ensemble digest": committee.digest},
    )
    return model_card(card)
