"""A search over trainings on Ray Tune. What survives a kill is the journal's; Tune only runs what has not ended.

Ray is imported inside the functions: a search that has ended must not wait for it.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from convoy.cluster.nodes import alive_nodes
from convoy.cluster.ray_data import first_cause, settle_ray_data
from convoy.cluster.search_plan import (
    CPUS_A_TRIAL,
    Concurrency,
    GivenUp,
    PastTrial,
    SchedulerConfig,
    SchedulerKind,
    SearchJournal,
    SearchPlan,
    TrialPoint,
    TrialProgress,
    fit_trials,
)
from convoy.cluster.training import TrialWorkers, WorkerOptions, plan_workers
from convoy.core.trial_events import TrialStatus

# How often a trial goes on after its process was lost, from where its training was.
_MAX_FAILURES = 2
# ASHA ends every trial that reaches this epoch, so no trial must: it would not be evaluated.
_NEVER_REACHED = 10**6
_POLL_S = 0.5
_QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    # No files of Tune's own beside the trials' documents.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_SYNCER": "1",
    # A trial that fails reports no accuracy, and our own handlers know what to do with a signal.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
}

# Runs one trial in its own process, to its document. What it raises makes Tune try again.
TrialFunction = Callable[[TrialPoint, TrialProgress], None]


def plan_trials(options: WorkerOptions, wanted: int | None, *, batch_bytes: int) -> Concurrency:
    """How many trials run at once, and the workers of each (see `fit_trials`); waits for nodes that are still starting.

    Raises NoRoom with the numbers if the cluster cannot hold one trial.
    """
    alone = {**dict(options), "num_workers": options.num_workers or 1}
    on_gpus = plan_workers(WorkerOptions(**alone)).gpus_per_worker > 0
    workers = TrialWorkers(**alone, on_gpus=on_gpus)
    fitting = fit_trials(workers, alive_nodes(), wanted, batch_bytes=batch_bytes)
    return fitting or Concurrency(max_concurrent=1, workers=workers)


def run_search(
    plan: SearchPlan,
    run_trial: TrialFunction,
    journal: SearchJournal,
    show: Callable[[Sequence[TrialStatus]], None],
    check: Callable[[], None],
) -> dict[str, GivenUp]:
    """Run trials until the space or the budget is used up; every one that ended has its document then.

    Returned is how those ended, by name, that still ran when the time was up: their documents are the caller's to
    leave, once nobody else can be running them.

    `run_trial` gets the trial's point and a progress to tell, in a process of its own on any node. Raises what
    `check` raises, as soon as it does; what keeps trials from going on and is not their fault, which leaves them
    without documents; the ConvoyError of the driver's side of a trial, or a ClusterError. Other errors inside a trial
    only end that trial.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    from ray import tune  # noqa: PLC0415

    from convoy.cluster.trial_queue import TrialQueue  # noqa: PLC0415
    from convoy.cluster.trial_reporting import Obstructed, TrialWatch  # noqa: PLC0415

    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    settle_ray_data()
    deadline_s = math.inf if plan.time_s is None else time.monotonic() + plan.time_s
    watch = TrialWatch(journal, show, deadline_s=deadline_s)
    tuner = tune.Tuner(
        tune.with_resources(_trainable(run_trial), {"cpu": CPUS_A_TRIAL}),
        tune_config=tune.TuneConfig(
            search_alg=TrialQueue(plan, journal),
            scheduler=_scheduler(plan.scheduler, plan.past),
            num_samples=-1,
            max_concurrent_trials=plan.max_concurrent,
            time_budget_s=plan.time_s,
        ),
        run_config=tune.RunConfig(
            name=plan.name,
            storage_path=plan.storage_uri,
            failure_config=tune.FailureConfig(max_failures=_MAX_FAILURES),
            callbacks=[watch],
            stop=Obstructed(watch),
            verbose=0,
        ),
    )
    ended: list[BaseException | None] = []
    thread = threading.Thread(target=_fit, args=(tuner, ended), name="search", daemon=True)
    thread.start()
    # Here the signal to stop is heard; inside Ray's own code it would become an error of Ray's.
    while thread.is_alive():
        thread.join(_POLL_S)
        check()
    if watch.obstacle is not None:
        raise watch.obstacle
    (error,) = ended
    if error is not None:
        raise first_cause(error) from error
    return watch.cut_short()


def _fit(tuner: Any, ended: list[BaseException | None]) -> None:
    try:
        tuner.fit()
        ended.append(None)
    except BaseException as error:
        ended.append(error)


def _trainable(run_trial: TrialFunction) -> Callable[[dict[str, Any]], None]:
    def trial(config: dict[str, Any]) -> None:
        from convoy.cluster.trial_queue import POINT  # noqa: PLC0415
        from convoy.cluster.trial_reporting import TrialReporter  # noqa: PLC0415

        run_trial(TrialPoint.model_validate_json(config[POINT]), TrialReporter())

    return trial


def _scheduler(config: SchedulerConfig, past: Sequence[PastTrial]) -> Any:
    """The scheduler, with what it would know had it seen the past trials itself."""
    from ray.tune.schedulers import FIFOScheduler  # noqa: PLC0415

    from convoy.cluster.trial_queue import METRIC  # noqa: PLC0415
    from convoy.cluster.trial_reporting import CURVE, EPOCH, CurveScheduler  # noqa: PLC0415

    if config.kind is SchedulerKind.NONE:
        return FIFOScheduler()
    scheduler = CurveScheduler(
        time_attr=EPOCH,
        metric=METRIC,
        mode="max",
        max_t=_NEVER_REACHED,
        grace_period=config.grace_period_epochs,
        reduction_factor=config.reduction_factor,
    )
    for trial in past:
        stand_in = _PastTuneTrial(trial.point.trial)
        scheduler.on_trial_add(None, stand_in)
        scheduler.on_trial_result(None, stand_in, {CURVE: trial.epochs})
    return scheduler


class _PastTuneTrial:
    """All that a scheduler asks of a trial that is over: by which name its results are filed."""

    def __init__(self, trial_id: str) -> None:
        self.trial_id = trial_id
