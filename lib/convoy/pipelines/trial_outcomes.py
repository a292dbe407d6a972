"""What a trial's training is worth on rows that it did not learn from, what it costs, and where its logits are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from convoy.core.crop_policies import (
    Averaging,
    CropPlan,
    CropPolicy,
    MemberOutputs,
    crop_views,
    view_indices,
)
from convoy.core.metrics import EvaluationCounts
from convoy.core.progress import Silent
from convoy.core.records import Split
from convoy.core.statistics import wilson_interval
from convoy.core.trial_events import TrialState
from convoy.pipelines.committee_predictions import CommitteeJob, CommitteePredictions
from convoy.pipelines.committees import CommitteeMember, open_committee
from convoy.pipelines.feature_summary import network_share, timings
from convoy.pipelines.folds import FoldModel, OutOfFold, out_of_fold
from convoy.pipelines.prediction_request import PredictionRequest
from convoy.pipelines.train import TrainReport
from convoy.pipelines.train_config import TrainConfig
from convoy.pipelines.trial_journal import TrialCost
from convoy.storage.bundles import MODEL_FILE
from convoy.storage.commits import read_manifest
from convoy.storage.leases import WhenHeld
from convoy.storage.manifests import Manifest
from convoy.storage.object_store import ObjectStore
from convoy.storage.runs import RunFolder
from convoy.vision.ensembling import mean_of_views
from convoy.vision.presets import EvalPreset


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialSetting:
    """Where a trial is at home: its training as it runs there, and the crops that its predictions keep, if named.

    `cluster_share` is the part of the cluster that predicts for it.
    """

    store: ObjectStore
    manifest: Manifest
    training: TrainConfig
    crops: CropPolicy | None
    cluster_share: float


def outcome_of_training(setting: TrialSetting, report: TrainReport) -> dict[str, Any]:
    """The fields of the record of a trial with one training; predicts the validation rows."""
    member = _member(setting, report.bundle)
    plan = CropPlan(policy=kept_crops(setting.crops, member.classifier.backbone.preset))
    predictions = _predict_validation_rows(setting, report.bundle, plan)
    return {
        "state": TrialState.FINISHED,
        "top1": report.top1,
        "top1_interval": report.intervals["top1_wilson"],
        "nll": report.nll,
        "epochs": report.val_top1_by_epoch,
        "train_run": report.train_run,
        "bundles": (report.bundle,),
        "predictions_runs": (predictions.run_id,),
        "rejects": predictions.manifest.num_rejects,
        "within_error_budget": report.within_error_budget,
        "cost": _cost(setting, [member], [predictions.run_id], plan),
    }


def outcome_of_folds(setting: TrialSetting, models: Sequence[FoldModel]) -> dict[str, Any]:
    """The fields of the record of a trial with a training a fold; predicts each fold by the model without it."""
    members = [_member(setting, model.bundle) for model in models]
    plan = CropPlan(policy=kept_crops(setting.crops, members[0].classifier.backbone.preset))
    rows = out_of_fold(
        setting.store,
        setting.manifest,
        models,
        setting.training,
        plan=plan,
        progress=Silent(),
    )
    return {
        "state": TrialState.FINISHED,
        **_worth(rows, plan, gives_probabilities=members[0].classifier.gives_probabilities),
        # By which it was compared with other trials while it ran.
        "epochs": models[0].epochs,
        "bundles": tuple(model.bundle for model in models),
        "predictions_runs": rows.runs,
        "rejects": len(rows.rejected),
        "within_error_budget": all(model.within_error_budget for model in models),
        "cost": _cost(setting, members, rows.runs, plan),
    }


def kept_crops(wanted: CropPolicy | None, preset: EvalPreset) -> CropPolicy:
    """Which crops are kept: where nothing is resized, all ten crops of a small image would be two."""
    if wanted is not None:
        return wanted
    return CropPolicy.FLIP if preset.resize_px is None else CropPolicy.TEN


def _member(setting: TrialSetting, bundle: str) -> CommitteeMember:
    (member,) = open_committee(setting.store, bundle).members
    return member


def _predict_validation_rows(setting: TrialSetting, bundle: str, plan: CropPlan) -> CommitteePredictions:
    training = setting.training
    request = PredictionRequest(
        committee=open_committee(setting.store, bundle).with_plan(plan),
        dataset=training.dataset,
        splits=(Split.VAL,),
        extraction=training.extraction,
        keep=MemberOutputs.VIEWS,
        local_cache=training.local_cache.options,
    )
    job = CommitteeJob(setting.store, setting.manifest, request)
    # Two trials can have come to the same model.
    return job.ensure(progress=Silent(), config=training.model_dump(mode="json"), when_held=WhenHeld.WAIT)


def _worth(rows: OutOfFold, plan: CropPlan, *, gives_probabilities: bool) -> dict[str, Any]:
    """Of all training rows, each by the model that did not see it: at the preset's own crop, or all crops together.

    All, averaged as one model's are, where the plan does not hold the preset's own.
    """
    logits_VNK, labels_N = rows.logits.logits_MVNK[0], rows.logits.labels_N
    center = view_indices(CropPolicy.CENTER, plan)
    if center is None:
        averaging = Averaging.PROBABILITIES if gives_probabilities else Averaging.LOGITS
        logits_NK = mean_of_views(logits_VNK, averaging)
    else:
        logits_NK = logits_VNK[center[0]]
    counts = EvaluationCounts(logits_NK.shape[1])
    counts.add(logits_NK, labels_N)
    metrics = counts.summary()
    num_correct = round(metrics.top1 * metrics.num_rows)
    return {
        "top1": metrics.top1,
        "top1_interval": wilson_interval(num_correct, metrics.num_rows),
        "nll": metrics.nll if gives_probabilities else None,
    }


def _cost(
    setting: TrialSetting, members: Sequence[CommitteeMember], runs: Sequence[str], plan: CropPlan
) -> TrialCost:
    """What the networks cost together: one image is decoded once, and goes through all of them."""
    backbones = [member.classifier.backbone for member in members]
    files = [f"{member.bundle.folder}{MODEL_FILE}" for member in members if member.bundle is not None]
    seconds = [one for run in runs if (one := _image_seconds(setting.store, run)) is not None]
    in_networks = sum(one.in_networks for one in seconds)
    in_all = in_networks + max((one.once for one in seconds), default=0.0)
    is_known = len(seconds) == len(runs) and in_all > 0
    return TrialCost(
        parameters=sum(backbone.num_parameters for backbone in backbones),
        macs=sum(member.classifier.macs for member in members),
        size_bytes=sum(setting.store.head(file).size_bytes for file in files),
        num_views=len(crop_views(plan)),
        images_per_s=1 / in_all if is_known else None,
        cluster_share=setting.cluster_share,
        network_share=in_networks / in_all if is_known else 1.0,
    )


class _ImageSeconds(NamedTuple):
    """What an image takes in networks, at all views, and what beside them."""

    in_networks: float
    once: float


def _image_seconds(store: ObjectStore, run: str) -> _ImageSeconds | None:
    """What an image took in a run, or None where it has no image."""
    manifest = read_manifest(RunFolder(store, run))
    if manifest is None or not manifest.num_results:
        return None
    seconds = 1 / float(timings(manifest.slices, 0.0)["images_per_s"])
    share = network_share(manifest.slices)
    return _ImageSeconds(in_networks=seconds * share, once=seconds * (1 - share))
