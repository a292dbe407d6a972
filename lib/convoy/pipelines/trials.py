"""One trial of a search, in a process of its own: training → bundle → validation predictions of every view → record."""

from __future__ import annotations

import time
import traceback
from collections.abc import Mapping
from typing import Any

from convoy.cluster.search_plan import Concurrency, TrialPoint, TrialProgress
from convoy.core.config import StrictModel
from convoy.core.crash_points import CrashPoint, crash_point
from convoy.core.crop_policies import CropPlan, CropPolicy, MemberOutputs, crop_views
from convoy.core.errors import ConvoyError
from convoy.core.progress import Silent
from convoy.core.records import Split
from convoy.core.trial_events import TrialState
from convoy.pipelines.committee_predictions import CommitteeJob, PredictionRequest
from convoy.pipelines.committees import open_committee
from convoy.pipelines.network_training import CurveDrawer
from convoy.pipelines.train import TrainReport, run_train
from convoy.pipelines.train_config import TrainConfig
from convoy.pipelines.trial_journal import TrialCost, TrialJournal, TrialRecord
from convoy.pipelines.tune_config import TuneConfig
from convoy.pipelines.tune_plan import network_key
from convoy.storage.bundles import MODEL_FILE, resolve_bundle
from convoy.storage.datasets import open_dataset
from convoy.storage.runs import RunFolder
from convoy.storage.stores import open_store
from convoy.vision.presets import EvalPreset


class TrialJob(StrictModel):
    """What all trials of a search are told: where it is, and the share of the cluster that each may use.

    `weights` are copies in the workspace, which every node can read, of the files that networks begin with: by
    `network_key`.
    """

    workspace: str
    run_id: str
    dataset_fingerprint: str
    config: TuneConfig
    share: Concurrency
    weights: Mapping[str, str]


def run_trial(job: TrialJob, draw_curves: CurveDrawer, point: TrialPoint, progress: TrialProgress) -> None:
    """Bring a trial to its record, unless it has one.

    An error of the trial is recorded and ends it. Raised is only what may heal, for another attempt.
    """
    journal = TrialJournal(RunFolder(open_store(job.workspace), job.run_id), job.config)
    record = journal.record(point.trial)
    if record is None:
        record = journal.write(_attempt(job, journal, point, progress, draw_curves))
    if record.state is TrialState.FINISHED and record.top1 is not None:
        progress.finish(record.epochs[-1][0] if record.epochs else 0, record.top1)


def _attempt(
    job: TrialJob,
    journal: TrialJournal,
    point: TrialPoint,
    progress: TrialProgress,
    draw_curves: CurveDrawer,
) -> TrialRecord:
    started_unix_s = time.time()
    config = journal.train_config(point)
    try:
        outcome = _train_and_predict(job, config, progress, draw_curves)
    except Exception as error:
        if isinstance(error, ConvoyError) and error.retryable:
            raise
        is_ours = isinstance(error, ConvoyError)
        outcome = {
            "state": TrialState.FAILED,
            "reason": str(error) if is_ours else f"{type(error).__name__}: {error}",
            # An error that we did not foresee is looked for by its trace.
            "details": None if is_ours else traceback.format_exc(),
        }
    return TrialRecord(
        **point.model_dump(),
        config=config.model_dump(mode="json"),
        started_unix_s=started_unix_s,
        finished_unix_s=time.time(),
        **outcome,
    )


def _train_and_predict(
    job: TrialJob, config: TrainConfig, progress: TrialProgress, draw_curves: CurveDrawer
) -> dict[str, Any]:
    """The fields of a finished trial's record."""
    report = run_train(
        _here(job, config),
        progress=progress,
        draw_curves=draw_curves,
        evaluated=Split.VAL,
        fingerprint=job.dataset_fingerprint,
    )
    crash_point(CrashPoint.TRIAL_TRAINED)
    predictions_run, cost = _keep_predictions(job, config, report.bundle)
    return {
        "state": TrialState.FINISHED,
        "top1": report.top1,
        "top1_interval": report.intervals["top1_wilson"],
        "nll": report.nll,
        "epochs": _epochs(report),
        "bundle": report.bundle,
        "train_run": report.train_run,
        "predictions_run": predictions_run,
        "cost": cost,
    }


def _keep_predictions(job: TrialJob, config: TrainConfig, bundle: str) -> tuple[str, TrialCost]:
    """Validation logits of every view, and what the network cost while they were computed."""
    store = open_store(job.workspace)
    committee = open_committee(store, bundle)
    (member,) = committee.members
    backbone = member.classifier.backbone
    plan = CropPlan(policy=kept_crops(job.config, backbone.preset))
    request = PredictionRequest(
        committee=committee.with_plan(plan),
        dataset=config.dataset,
        splits=(Split.VAL,),
        extraction=_here(job, config).extraction,
        keep=MemberOutputs.VIEWS,
    )
    manifest = open_dataset(store, config.dataset, job.dataset_fingerprint)
    predictions = CommitteeJob(store, manifest, request).ensure(
        progress=Silent(), config=config.model_dump(mode="json")
    )
    return predictions.run_id, TrialCost(
        parameters=backbone.num_parameters,
        macs=backbone.macs,
        size_bytes=store.head(f"{resolve_bundle(store, bundle).folder}{MODEL_FILE}").size_bytes,
        num_views=len(crop_views(plan)),
        images_per_s=predictions.images_per_s,
    )


def kept_crops(config: TuneConfig, preset: EvalPreset) -> CropPolicy:
    """Which crops the validation predictions keep: where nothing is resized, all ten crops would be two."""
    if config.crops is not None:
        return config.crops
    return CropPolicy.TEN if preset.resize_px is not None else CropPolicy.FLIP


def _here(job: TrialJob, config: TrainConfig) -> TrainConfig:
    """The training as it runs in this process: its share of the cluster, and files that are on every node."""
    backbone = config.backbone
    weights = job.weights.get(network_key(backbone), backbone.weights)
    operators = {"num_workers": job.share.workers.num_workers, "cpus_per_worker": job.share.operator_cpus}
    return config.model_copy(
        update={
            "workspace": job.workspace,
            "backbone": backbone.model_copy(update={"weights": weights}),
            "workers": job.share.workers,
            "extraction": config.extraction.model_copy(update=operators),
        }
    )


def _epochs(report: TrainReport) -> tuple[tuple[int, float], ...]:
    return tuple((one.epoch, one.val_top1) for one in report.history if one.val_top1 is not None)
