"""One trial of a search, in a process of its own: training → bundle → validation predictions of every view → record."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from convoy.cluster.search_plan import Concurrency, TrialPoint, TrialProgress
from convoy.core.config import StrictModel
from convoy.core.crash_points import CrashPoint, crash_point
from convoy.core.errors import OBSTACLES, ClusterError, ConvoyError
from convoy.core.records import Split
from convoy.core.trial_events import TrialState
from convoy.pipelines.feature_plan import PrecisionChoice
from convoy.pipelines.folds import train_folds
from convoy.pipelines.network_training import CurveDrawer
from convoy.pipelines.train import run_train
from convoy.pipelines.train_config import NETWORKS, TrainConfig
from convoy.pipelines.trial_journal import TrialJournal, TrialRecord
from convoy.pipelines.trial_outcomes import TrialSetting, outcome_of_folds, outcome_of_training
from convoy.pipelines.tune_config import TuneConfig
from convoy.pipelines.tune_plan import network_key
from convoy.storage.datasets import open_dataset
from convoy.storage.leases import WhenHeld
from convoy.storage.runs import RunFolder
from convoy.storage.stores import open_store
from convoy.vision.training_config import TrainingPrecision


class TrialJob(StrictModel):
    """What all trials of a search are told: where it is, and the share of the cluster that each may use.

    `weights` are copies in the workspace, which every node can read, of the files that networks begin with: by
    `network_key`. `teachers` are bundles by digest, by what the config calls them. `code_digests` are those of
    factories, by their arch. `precision` is what `auto` means in all trials, on whichever node they run.
    """

    workspace: str
    run_id: str
    dataset_fingerprint: str
    config: TuneConfig
    share: Concurrency
    weights: Mapping[str, str]
    teachers: Mapping[str, str]
    code_digests: Mapping[str, str]
    precision: PrecisionChoice


def run_trial(job: TrialJob, draw_curves: CurveDrawer, point: TrialPoint, progress: TrialProgress) -> None:
    """Bring a trial to its record, unless it has one.

    An error of the trial is recorded and ends it. Raised is only what is not the trial's fault, for another attempt.
    """
    journal = TrialJournal(RunFolder(open_store(job.workspace), job.run_id), job.config)
    record = journal.record(point.trial)
    if record is None:
        record = journal.write(_attempt(job, journal, point, progress, draw_curves))
    if record.state is TrialState.FINISHED and record.top1 is not None:
        progress.finish(record.epochs, record.top1)


def _attempt(
    job: TrialJob,
    journal: TrialJournal,
    point: TrialPoint,
    progress: TrialProgress,
    draw_curves: CurveDrawer,
) -> TrialRecord:
    started_unix_s = time.time()
    try:
        outcome = _train_and_predict(job, journal, point, progress, draw_curves)
    except Exception as error:
        if isinstance(error, (ClusterError, *OBSTACLES)):
            # Not the trial's fault: another attempt goes on from its checkpoint.
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
        config=journal.recorded_config(point),
        started_unix_s=started_unix_s,
        finished_unix_s=time.time(),
        **outcome,
    )


def _train_and_predict(
    job: TrialJob,
    journal: TrialJournal,
    point: TrialPoint,
    progress: TrialProgress,
    draw_curves: CurveDrawer,
) -> dict[str, Any]:
    """The fields of a finished trial's record; what an earlier attempt has trained is not trained again."""
    store, here = open_store(job.workspace), _here(job, journal.train_config(point))
    manifest = open_dataset(store, here.dataset, job.dataset_fingerprint)
    setting = TrialSetting(
        store=store,
        manifest=manifest,
        training=here,
        crops=job.config.crops,
        cluster_share=job.share.cluster_share,
    )
    given: dict[str, Any] = {
        "progress": progress,
        "draw_curves": draw_curves,
        "fingerprint": manifest.fingerprint,
    }
    outcome: Callable[[], dict[str, Any]]
    if job.config.folds is None:
        report = journal.trained(point)
        if report is None:
            report = run_train(here, evaluated=Split.VAL, when_held=WhenHeld.WAIT, **given)
            journal.keep_trained(point, report)
        outcome = partial(outcome_of_training, setting, report)
    else:
        outcome = partial(outcome_of_folds, setting, train_folds(here, job.config.folds, **given))
    crash_point(CrashPoint.TRIAL_TRAINED)
    return outcome()


def _here(job: TrialJob, config: TrainConfig) -> TrainConfig:
    """The training as it runs in this process: its share of the cluster, and what is the same in all trials."""
    backbone, distill = config.backbone, config.distill
    told = config.network_extraction if config.strategy in NETWORKS else config.extraction
    fetched = {
        "weights": job.weights.get(network_key(backbone), backbone.weights),
        "code_digest": job.code_digests.get(backbone.arch),
    }
    extraction: dict[str, Any] = {
        "num_workers": job.share.workers.num_workers,
        "cpus_per_worker": job.share.operator_cpus,
    }
    if told.precision is PrecisionChoice.AUTO:
        extraction["precision"] = job.precision
    if distill is not None:
        teacher = job.teachers.get(distill.teacher, distill.teacher)
        distill = distill.model_copy(update={"teacher": teacher})
    recipe = config.recipe
    if recipe.precision is TrainingPrecision.AUTO:
        recipe = recipe.model_copy(update={"precision": TrainingPrecision(job.precision.value)})
    return config.model_copy(
        update={
            "workspace": job.workspace,
            "backbone": backbone.model_copy(update=fetched),
            "distill": distill,
            "workers": job.share.workers,
            "extraction": told.model_copy(update=extraction),
            "recipe": recipe,
        }
    )
