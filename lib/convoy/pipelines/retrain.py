"""`convoy retrain`: refresh → what is new → checks → the cheapest candidate that helps → gate → promote or hold.

Once a logical date: a date that was decided answers with its stored decision, a killed one goes on where it stopped.
"""

from __future__ import annotations

import time

from convoy.core.progress import Progress
from convoy.pipelines.network_training import CurveDrawer
from convoy.pipelines.retrain_config import RetrainConfig, RetrainReport
from convoy.pipelines.retrain_plan import (
    plan_retrain,
    refuse_date,
    refuse_other_settings,
    refuse_unchosen_head,
    settled_report,
)
from convoy.pipelines.workspace import open_workspace
from convoy.storage.bundles import check_bundle_name
from convoy.storage.leases import RunLease
from convoy.storage.object_store import ObjectStore
from convoy.storage.retrains import RetrainFolder, hold_retrain
from convoy.vision.factories import with_pinned_code


def run_retrain(config: RetrainConfig, *, progress: Progress, draw_curves: CurveDrawer) -> RetrainReport:
    """Bring a model up to date, or find that nothing has to be done; the same date again changes nothing.

    Raises LeaseHeld, naming the holder, where another process retrains this model, and ConfigError for a date before
    one that was decided, also if it was begun then, for one to come, or for one that was begun with other settings.
    """
    check_bundle_name(config.name)
    store = open_workspace(config.workspace, config.writers)
    folder = RetrainFolder(store, config.name)
    date = config.logical_date
    # Midnight may pass while this waits for another driver.
    config = config.model_copy(update={"date": date})
    decided = folder.decision(date)
    if decided is not None:
        return RetrainReport.model_validate(decided)
    config = config.model_copy(update={"backbone": with_pinned_code(config.backbone)})
    with hold_retrain(folder) as lease:
        # By the one that held the lease before.
        decided = folder.decision(date)
        if decided is not None:
            return RetrainReport.model_validate(decided)
        report = _retrain(store, folder, config, date, lease, progress, draw_curves)
        lease.confirm()
        folder.write_decision(date, report.model_dump(mode="json"))
    return report


def _retrain(
    store: ObjectStore,
    folder: RetrainFolder,
    config: RetrainConfig,
    date: str,
    lease: RunLease,
    progress: Progress,
    draw_curves: CurveDrawer,
) -> RetrainReport:
    started_s = time.monotonic()
    refuse_date(folder, date)
    plan = folder.plan(date)
    if plan is None:
        plan = plan_retrain(store, folder, config, progress)
        refuse_unchosen_head(store, plan, config)
        folder.write_plan(plan)
    refuse_other_settings(plan, config)
    report = settled_report(folder, plan)
    if report is None:
        # Imports torch, which a date without anything to decide need not wait for.
        from convoy.pipelines.retrain_work import RetrainJob  # noqa: PLC0415

        job = RetrainJob(store, folder, config, plan, progress=progress, draw_curves=draw_curves)
        report = job.run(lease)
    return report.model_copy(update={"seconds": time.monotonic() - started_s})
