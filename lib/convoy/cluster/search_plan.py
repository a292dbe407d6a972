"""What a search over trainings is told, and how many trials the cluster can hold at once. Free of torch and Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from pydantic import Field, PositiveInt

from convoy.cluster.nodes import worker_nodes
from convoy.cluster.training import TrialWorkers, WorkerOptions, WorkerPlan, fit_workers
from convoy.core.config import StrictModel
from convoy.core.progress import Progress
from convoy.core.search_space import SearchSpace, Values
from convoy.core.trial_events import TrialState, TrialStatus

# A trial's own process mostly waits: its workers do the work, and have reservations of their own.
CPUS_A_TRIAL = 0.1


class SearchKind(StrEnum):
    """How points are drawn.

    `random`: independently, as a pure function of seed and number (Bergstra and Bengio 2012). `optuna`: by its
    tree-structured Parzen estimator, from the trials that have ended (Akiba et al. 2019, arXiv:1907.10902); where it
    keeps to points that are known, as `random` does.
    """

    RANDOM = "random"
    OPTUNA = "optuna"


class SchedulerKind(StrEnum):
    """Which trials are stopped early.

    `asha`: at 1, r, r^2, ... times the grace period those whose validation top-1 is not among the best 1/r of the
    trials that came so far (Li et al. 2020, arXiv:1810.05934).
    """

    NONE = "none"
    ASHA = "asha"


class SchedulerConfig(StrictModel):
    """`grace_period_epochs` and `reduction_factor` (the r of its rule) belong to `asha`."""

    kind: SchedulerKind = SchedulerKind.NONE
    grace_period_epochs: PositiveInt = 1
    reduction_factor: float = Field(default=3.0, gt=1)


class TrialPoint(StrictModel):
    """A trial before it starts: its name, its number in the search, and what was drawn for it."""

    trial: str
    index: int
    values: dict[str, Any]


EpochAccuracies = tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PastTrial:
    """A trial that an earlier call brought to its end; `epochs` are numbers of epochs and validation top-1."""

    point: TrialPoint
    state: TrialState
    top1: float | None
    epochs: EpochAccuracies


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenUp:
    """How a trial ended that could not say so itself."""

    state: TrialState
    reason: str
    epochs: EpochAccuracies
    seconds: float


class SearchJournal(Protocol):
    """What a search remembers beyond its process. Every method may be called again with the same arguments."""

    def point(self, index: int, values: Values) -> TrialPoint:
        """The trial of a point, by a name that nothing else has."""
        ...

    def drawn(self, point: TrialPoint) -> None:
        """Remember a trial before it starts."""
        ...

    def ended(self, point: TrialPoint) -> TrialStatus | None:
        """How a trial ended, or None while it has not left its document."""
        ...

    def give_up(self, point: TrialPoint, end: GivenUp) -> None:
        """Leave the document of a trial that could not do it itself."""
        ...


class TrialProgress(Progress, Protocol):
    """What a trial tells the search while it runs. Each epoch may be its last: then `training` does not return."""

    def finish(self, epochs: EpochAccuracies, top1: float) -> None:
        """The trial has its record, with these epochs and this validation top-1."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchPlan:
    """A search with nothing left to choose.

    `waiting` were drawn by an earlier call and have not ended; `max_trials` counts all calls together.
    `storage_uri` is where Ray Tune may write: nothing is ever read back from there.
    """

    name: str
    kind: SearchKind
    space: SearchSpace
    seed: int
    scheduler: SchedulerConfig
    max_concurrent: int
    max_trials: int | None
    time_s: float | None
    past: tuple[PastTrial, ...]
    waiting: tuple[TrialPoint, ...]
    storage_uri: str


class Concurrency(StrictModel):
    """How many trials run side by side, the workers of each, and the threads of its operators beside them.

    `operator_cpus` is null where the operators sit on GPUs, of which each trial has its own. `cluster_share` is the
    part of the cluster's GPUs, or else CPUs, that the operators of one trial have.
    """

    max_concurrent: int
    workers: TrialWorkers
    operator_cpus: int | None = None
    cluster_share: float = 1.0


def fit_trials(
    options: WorkerOptions, nodes: Sequence[Mapping[str, float]], wanted: int | None, *, batch_bytes: int = 0
) -> Concurrency | None:
    """The trials that nodes with so many `CPU` and `GPU` each hold at once, or None if they cannot hold one.

    A trial has the workers of its options, one by default: on GPUs one GPU each, else all CPUs of a node, and a
    process of its own beside them. More trials than `wanted`, or than the nodes can hold, are never planned: trials
    that wait for each other's CPUs would run into the time limits of Ray Train. `batch_bytes` are those of the largest
    batch of any trial's worker, see `fit_workers`.
    """
    workers_per_trial = options.num_workers or 1
    most = wanted or _most_trials(options, nodes, workers_per_trial)
    for num_trials in range(most, 0, -1):
        together = options.model_copy(update={"num_workers": num_trials * workers_per_trial})
        plan = fit_workers(together, nodes, cpus_beside=num_trials * CPUS_A_TRIAL, batch_bytes=batch_bytes)
        if plan is not None:
            share = {
                "num_workers": workers_per_trial,
                "cpus_per_worker": plan.num_threads,
                "ingest": plan.ingest,
                "preparers_per_worker": plan.preparers_per_worker,
                "on_gpus": plan.gpus_per_worker > 0,
            }
            return Concurrency(
                max_concurrent=num_trials,
                workers=TrialWorkers.model_validate({**dict(options), **share}),
                operator_cpus=None if plan.gpus_per_worker else plan.num_threads,
                cluster_share=_cluster_share(workers_per_trial, plan, nodes),
            )
    return None


def _cluster_share(num_workers: int, plan: WorkerPlan, nodes: Sequence[Mapping[str, float]]) -> float:
    if plan.gpus_per_worker:
        return num_workers / sum(node["GPU"] for node in worker_nodes(nodes))
    return min(1.0, num_workers * plan.num_threads / sum(node["CPU"] for node in nodes))


def _most_trials(options: WorkerOptions, nodes: Sequence[Mapping[str, float]], workers_per_trial: int) -> int:
    num_gpus = int(sum(node["GPU"] for node in worker_nodes(nodes)))
    if num_gpus:
        return max(1, num_gpus // workers_per_trial)
    alone = fit_workers(options.model_copy(update={"num_workers": workers_per_trial}), nodes)
    if alone is None:
        return 1
    return max(1, sum(int(node["CPU"] / alone.num_threads) for node in nodes) // workers_per_trial)
