"""`convoy retrain`: refresh → what is new → checks → the cheapest candidate that helps → gate → promote or hold.

Once a logical date: a date that was decided answers with its stored decision, a killed one goes on where it stopped.
"""

from __future__ import annotations

import time
from pathlib import Path

from convoy.core.differences import describe_changes
from convoy.core.errors import ConfigError
from convoy.core.progress import Progress
from convoy.pipelines.network_training import CurveDrawer
from convoy.pipelines.retrain_config import Decision, RetrainConfig, RetrainReport
from convoy.pipelines.workspace import open_workspace
from convoy.storage.bundles import check_bundle_name
from convoy.storage.datasets import freeze_dataset, open_dataset
from convoy.storage.leases import RunLease
from convoy.storage.object_store import ObjectStore
from convoy.storage.registry import Alias, read_aliases
from convoy.storage.retrains import RetrainFolder, RetrainPlan, hold_retrain

# What may differ between two calls for one date: where, how fast and who hears of it, not what.
_FREE_KEYS = ("workspace", "writers", "date", "mirror")


def run_retrain(config: RetrainConfig, *, progress: Progress, draw_curves: CurveDrawer) -> RetrainReport:
    """Bring a model up to date, or find that nothing has to be done; the same date again changes nothing.

    Raises LeaseHeld, naming the holder, where another process retrains this model, and ConfigError for a date before
    one that was decided, or for a date that was begun with other settings.
    """
    check_bundle_name(config.name)
    store = open_workspace(config.workspace, config.writers)
    folder = RetrainFolder(store, config.name)
    date = config.logical_date
    decided = folder.decision(date)
    if decided is not None:
        return RetrainReport.model_validate(decided)
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
    plan = folder.plan(date)
    if plan is None:
        plan = _plan(store, folder, config, date, progress)
        folder.write_plan(plan)
    _refuse_other_settings(plan, config)
    if plan.fingerprint == plan.previous_fingerprint and plan.champion is not None:
        return RetrainReport(
            decision=Decision.NOTHING_NEW,
            reason="the dataset is the one that was decided about last",
            recomputed=0,
            date=date,
            model=config.name,
            dataset_fingerprint=plan.fingerprint,
            champion=f"{config.name}@{plan.champion}",
            seconds=time.monotonic() - started_s,
        )
    # Imports torch, which a date without anything new need not wait for.
    from convoy.pipelines.retrain_work import RetrainJob  # noqa: PLC0415

    job = RetrainJob(store, folder, config, plan, progress=progress, draw_curves=draw_curves)
    report = job.run(lease)
    return report.model_copy(update={"seconds": time.monotonic() - started_s})


def _plan(
    store: ObjectStore, folder: RetrainFolder, config: RetrainConfig, date: str, progress: Progress
) -> RetrainPlan:
    """Freeze what this date is about."""
    dates = folder.decided_dates()
    if dates and date < dates[-1]:
        raise ConfigError(
            f"{dates[-1]} was decided already, and {date} is before it",
            where="date",
            next_step="retrain for a later date: it takes all that is new since then",
        )
    previous = folder.decision(dates[-1]) if dates else None
    if config.source is not None:
        progress.stage(f"looking at {config.source}")
        # A path in a config is meant from where the command runs, as in `convoy dataset`.
        source = config.source if "://" in config.source else str(Path(config.source).absolute())
        freeze_dataset(store, config.dataset, source, reading=config.reading, splits=config.splits)
    return RetrainPlan(
        date=date,
        fingerprint=open_dataset(store, config.dataset).fingerprint,
        previous_fingerprint=None if previous is None else previous["dataset_fingerprint"],
        champion=read_aliases(store, config.name).aliases.get(Alias.CHAMPION),
        config=_settings(config),
    )


def _settings(config: RetrainConfig) -> dict[str, object]:
    """What a date is decided by."""
    settings = config.model_dump(mode="json")
    return {name: value for name, value in settings.items() if name not in _FREE_KEYS}


def _refuse_other_settings(plan: RetrainPlan, config: RetrainConfig) -> None:
    changes = describe_changes(plan.config, _settings(config))
    if changes:
        raise ConfigError(
            f"the retraining of {plan.date} was begun with other settings:\n" + "\n".join(changes),
            where=f"retrains/{config.name}/{plan.date}",
            next_step="restore them to finish that date, or take the next date for the new ones",
        )
