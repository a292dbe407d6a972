"""Searches without Ray's processes: how many trials fit, which comes next, and what a resumed search knows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from convoy.cluster.search_plan import (
    GivenUp,
    PastTrial,
    SchedulerConfig,
    SchedulerKind,
    SearchKind,
    SearchPlan,
    TrialPoint,
    fit_trials,
)
from convoy.cluster.training import TrialWorkers, WorkerOptions
from convoy.cluster.training_spec import Ingest
from convoy.cluster.trial_queue import METRIC, POINT, TrialQueue
from convoy.cluster.trial_reporting import CURVE, EPOCH
from convoy.cluster.tuning import _PastTuneTrial, _scheduler
from convoy.core.search_space import Values, parse_space
from convoy.core.trial_events import TrialState, TrialStatus

LAPTOP = [{"CPU": 2.0, "GPU": 0.0}]
GPU_NODE = {"CPU": 16.0, "GPU": 4.0}
# Which no worker can use.
GPUS_WITHOUT_CPUS = {"CPU": 0.0, "GPU": 4.0}


@pytest.mark.parametrize(
    ("options", "nodes", "wanted", "expected"),
    [
        # (trials at once, workers of each, threads of each worker)
        ({}, LAPTOP, None, (1, 1, 2)),
        ({"cpus_per_worker": 1}, LAPTOP, None, (2, 1, 1)),
        ({}, LAPTOP, 2, (2, 1, 1)),
        ({"num_workers": 2}, LAPTOP, None, (1, 2, 1)),
        ({}, [{"CPU": 8.0, "GPU": 0.0}] * 4, None, (4, 1, 8)),
        ({}, [GPU_NODE], None, (4, 1, 2)),
        ({"num_workers": 2}, [GPU_NODE], None, (2, 2, 2)),
        ({"num_workers": 2}, [GPU_NODE, GPUS_WITHOUT_CPUS], None, (2, 2, 2)),
        ({"cpus_per_worker": 1}, [*LAPTOP, GPUS_WITHOUT_CPUS], None, (2, 1, 1)),
        ({}, [GPU_NODE] * 2, 3, (3, 1, 2)),
        ({"cpus_per_worker": 7}, [GPU_NODE], None, (2, 1, 7)),
        # Two of 7.5 CPUs, a preparer for each, and the trials' own processes would need more than all 16.
        ({"cpus_per_worker": 8, "ingest": "split"}, [GPU_NODE], None, (1, 1, 8)),
        ({"cpus_per_worker": 8}, [GPU_NODE], None, (2, 1, 8)),
        # Trials of one thread each ask for half a CPU, and a tenth for their own process.
        ({"cpus_per_worker": 1}, LAPTOP, 4, (3, 1, 1)),
        # More than fit are not planned, however many are wanted.
        ({"cpus_per_worker": 2}, LAPTOP, 5, (1, 1, 2)),
    ],
)
def test_trials_share_the_cluster_without_waiting_for_each_other(
    options: dict[str, Any], nodes: list[dict[str, float]], wanted: int | None, expected: tuple[int, int, int]
) -> None:
    fitting = fit_trials(WorkerOptions.model_validate(options), nodes, wanted)
    assert fitting is not None
    workers = fitting.workers
    assert (fitting.max_concurrent, workers.num_workers, workers.cpus_per_worker) == expected


@pytest.mark.parametrize(
    ("options", "nodes", "wanted", "expected"),
    [
        ({}, [{"CPU": 16.0, "GPU": 0.0}], 1, 1),
        ({}, [{"CPU": 16.0, "GPU": 0.0}], 8, 1 / 8),
        ({}, [{"CPU": 8.0, "GPU": 0.0}] * 4, None, 1 / 4),
        ({"num_workers": 2}, LAPTOP, None, 1),
        # One trial at a time, and most of the cluster idle meanwhile.
        ({"cpus_per_worker": 2}, [{"CPU": 16.0, "GPU": 0.0}], 1, 1 / 8),
        ({}, [GPU_NODE] * 2, 3, 1 / 8),
        ({"num_workers": 2}, [GPU_NODE], None, 1 / 2),
        ({"num_workers": 2}, [GPU_NODE, GPUS_WITHOUT_CPUS], None, 1 / 2),
    ],
)
def test_a_trial_knows_its_share_of_the_cluster(
    options: dict[str, Any], nodes: list[dict[str, float]], wanted: int | None, expected: float
) -> None:
    fitting = fit_trials(WorkerOptions.model_validate(options), nodes, wanted)
    assert fitting is not None
    assert fitting.cluster_share == expected


@pytest.mark.parametrize(("node", "on_gpus"), [(GPU_NODE, True), (LAPTOP[0], False)])
def test_the_share_of_a_trial_says_whether_it_has_gpus(node: dict[str, float], on_gpus: bool) -> None:
    fitting = fit_trials(WorkerOptions(), [node], None)
    assert fitting is not None
    assert fitting.workers.on_gpus is on_gpus
    # Also where GPUs came while the search was planned.
    planned = fit_trials(TrialWorkers(on_gpus=False), [GPU_NODE], None)
    assert planned is not None
    assert not planned.workers.on_gpus


@pytest.mark.parametrize(("batch_mb", "ingest"), [(10, Ingest.SPLIT), (40, Ingest.FUSED)])
def test_the_batches_of_all_trials_together_fit_into_the_object_store(batch_mb: int, ingest: Ingest) -> None:
    """Of four workers with two preparers each, for each of which three batches may lie there."""
    node = {**GPU_NODE, "object_store_memory": 1e9}
    fitting = fit_trials(WorkerOptions(preparers_per_worker=2), [node], None, batch_bytes=batch_mb * 10**6)
    assert fitting is not None
    assert (fitting.max_concurrent, fitting.workers.ingest) == (4, ingest)


def test_a_cluster_too_small_for_one_trial_gives_no_plan() -> None:
    assert fit_trials(WorkerOptions(cpus_per_worker=8), LAPTOP, None) is None


@dataclass
class MemoryJournal:
    points: list[TrialPoint] = field(default_factory=list)
    states: dict[str, TrialState] = field(default_factory=dict)

    def point(self, index: int, values: Values) -> TrialPoint:
        return TrialPoint(trial=f"{index:03}", index=index, values=values)

    def drawn(self, point: TrialPoint) -> None:
        self.points.append(point)

    def ended(self, point: TrialPoint) -> TrialStatus | None:
        state = self.states.get(point.trial)
        return None if state is None else TrialStatus(trial=point.trial, state=state, values=point.values)

    def give_up(self, point: TrialPoint, end: GivenUp) -> None:
        raise AssertionError("a queue gives nothing up")


def plan(**fields: Any) -> SearchPlan:
    values: dict[str, Any] = {
        "name": "search",
        "kind": SearchKind.RANDOM,
        "space": parse_space({"x": {"uniform": [0, 1]}, "arch": {"choice": ["a", {"b": 1}]}}),
        "seed": 0,
        "scheduler": SchedulerConfig(),
        "max_concurrent": 1,
        "max_trials": 6,
        "time_s": None,
        "past": (),
        "waiting": (),
        "storage_uri": "",
    }
    return SearchPlan(**{**values, **fields})


def taken(queue: TrialQueue, number: int = 100, top1: float | None = 0.5) -> list[TrialPoint]:
    """The trials of a queue, each ended before the next is asked for."""
    points = []
    for _ in range(number):
        suggested = queue.suggest(f"tune-{id(queue)}-{len(points)}")
        if suggested == Searcher.FINISHED:
            break
        points.append(TrialPoint.model_validate_json(suggested[POINT]))
        result = None if top1 is None else {METRIC: top1}
        queue.on_trial_complete(f"tune-{id(queue)}-{len(points) - 1}", result, error=top1 is None)
    return points


def past(point: TrialPoint, top1: float | None = 0.5) -> PastTrial:
    state = TrialState.FAILED if top1 is None else TrialState.FINISHED
    return PastTrial(point=point, state=state, top1=top1, epochs=())


@pytest.mark.parametrize("kind", SearchKind)
def test_a_queue_ends_with_the_budget_and_remembers_every_trial_first(kind: SearchKind) -> None:
    journal = MemoryJournal()
    points = taken(TrialQueue(plan(kind=kind), journal))
    assert [point.index for point in points] == list(range(6))
    assert journal.points == points
    assert len({point.values["x"] for point in points}) == 6


def test_a_resumed_random_search_draws_what_the_first_call_would_have_drawn() -> None:
    whole = taken(TrialQueue(plan(), MemoryJournal()))
    known = plan(past=(past(whole[0]), past(whole[2], None)), waiting=(whole[1], whole[3]))
    assert taken(TrialQueue(known, MemoryJournal())) == [whole[1], whole[3], *whole[4:]]


def test_a_resumed_estimating_search_repeats_nothing() -> None:
    first = taken(TrialQueue(plan(kind=SearchKind.OPTUNA), MemoryJournal()), 3)
    known = plan(kind=SearchKind.OPTUNA, past=tuple(past(point) for point in first[:2]), waiting=(first[2],))
    rest = taken(TrialQueue(known, MemoryJournal()))
    assert rest[0] == first[2]
    assert [point.index for point in rest] == [2, 3, 4, 5]
    drawn = [*first, *rest[1:]]
    assert len({str(point.values) for point in drawn}) == len(drawn)


def test_the_estimator_goes_where_accuracy_was_high() -> None:
    """Also from trials of an earlier call, which it was told of and did not suggest itself."""
    space = parse_space({"x": {"uniform": [0, 1]}, "arch": {"choice": ["bad", "good"]}})
    points = [
        TrialPoint(trial=f"{i:03}", index=i, values={"x": (i % 20) / 20, "arch": ("bad", "good")[i // 20]})
        for i in range(40)
    ]
    told = tuple(past(one, 1 - abs(one.values["x"] - 0.8) - (one.values["arch"] == "bad")) for one in points)
    queue = TrialQueue(plan(kind=SearchKind.OPTUNA, space=space, past=told, max_trials=60), MemoryJournal())
    drawn = taken(queue, 20)
    assert sum(abs(point.values["x"] - 0.8) < 0.2 for point in drawn) > 14
    assert sum(point.values["arch"] == "good" for point in drawn) > 14


def test_failed_trials_teach_the_estimator_nothing_and_do_not_stop_it() -> None:
    assert len(taken(TrialQueue(plan(kind=SearchKind.OPTUNA), MemoryJournal()), top1=None)) == 6


def test_a_trial_that_recorded_its_failure_teaches_the_estimator_no_accuracy_of_its_last_epoch() -> None:
    """In the call that ran it as in one that goes on. One that was stopped early counts with what it had."""
    journal = MemoryJournal()
    queue = TrialQueue(plan(kind=SearchKind.OPTUNA), journal)
    for trial, state in (("failed", TrialState.FAILED), ("stopped", None), ("finished", TrialState.FINISHED)):
        queue.suggest(trial)
        if state is not None:
            journal.states[journal.points[-1].trial] = state
        queue.on_trial_complete(trial, {METRIC: 0.9})
    ended = [past(point, top1) for point, top1 in zip(journal.points, (None, 0.9, 0.9), strict=True)]
    resumed = TrialQueue(plan(kind=SearchKind.OPTUNA, past=tuple(ended)), MemoryJournal())
    for one in (queue, resumed):
        study = one._drawer._search._ot_study  # type: ignore[attr-defined]
        assert [trial.value for trial in study.trials] == [None, 0.9, 0.9]


def test_a_finite_space_ends_before_its_budget() -> None:
    space = parse_space({"arch": {"choice": ["a", "b"]}, "seed": {"int": [0, 1]}})
    for kind in SearchKind:
        points = taken(TrialQueue(plan(kind=kind, space=space, max_trials=50), MemoryJournal()))
        assert len(points) == 4


def test_an_estimator_that_keeps_to_known_points_goes_on_with_unknown_ones() -> None:
    """All points but one lie far from the best, where it suggests nothing in 50 draws."""
    space = parse_space({"x": {"int": [0, 29]}})
    points = [TrialPoint(trial=f"{x:03}", index=x, values={"x": x}) for x in range(29)]
    told = tuple(past(one, 1 - one.values["x"] / 30) for one in points)
    search = plan(kind=SearchKind.OPTUNA, space=space, past=told, max_trials=40)
    drawn, again = (taken(TrialQueue(search, MemoryJournal())) for _ in range(2))
    assert [point.values["x"] for point in drawn] == [29]
    assert again == drawn


def test_asha_of_a_resumed_search_compares_with_the_past_and_lets_last_epochs_be() -> None:
    config = SchedulerConfig(kind=SchedulerKind.ASHA, grace_period_epochs=2, reduction_factor=2)
    points = [TrialPoint(trial=str(number), index=number, values={}) for number in range(4)]
    history = tuple(
        PastTrial(
            point=point,
            state=TrialState.FINISHED,
            top1=0.5 + index / 10,
            epochs=((1, 0.1), (2, 0.5 + index / 10)),
        )
        for index, point in enumerate(points)
    )
    for known, expected in ((history, TrialScheduler.STOP), ((), TrialScheduler.CONTINUE)):
        scheduler = _scheduler(config, known)
        trial = _PastTuneTrial("new")
        scheduler.on_trial_add(None, trial)
        first = scheduler.on_trial_result(None, trial, {EPOCH: 1, METRIC: 0.0})
        assert first == TrialScheduler.CONTINUE, "the grace period"
        assert scheduler.on_trial_result(None, trial, {EPOCH: 2, METRIC: 0.55}) == expected
    scheduler = _scheduler(config, ())
    best = _PastTuneTrial("best")
    scheduler.on_trial_add(None, best)
    decisions = {scheduler.on_trial_result(None, best, {EPOCH: e, METRIC: 0.9}) for e in range(1, 200)}
    assert decisions == {TrialScheduler.CONTINUE}


def test_a_trial_that_goes_on_counts_at_each_rung_with_what_it_had_there() -> None:
    """Else a new trial is compared at its first epoch with the sixth of others, and stopped."""
    config = SchedulerConfig(kind=SchedulerKind.ASHA, reduction_factor=3)
    curve = tuple((epoch, 0.5 + 0.04 * epoch) for epoch in range(1, 9))
    scheduler = _scheduler(config, ())
    for name in ("first", "second"):
        resumed = _PastTuneTrial(name)
        scheduler.on_trial_add(None, resumed)
        scheduler.on_trial_result(None, resumed, {CURVE: curve[:4]})
        for epoch, top1 in curve[4:7]:
            scheduler.on_trial_result(None, resumed, {EPOCH: epoch, METRIC: top1, CURVE: curve[:epoch]})
    for gain, expected in ((0.0, TrialScheduler.CONTINUE), (-0.1, TrialScheduler.STOP)):
        new = _PastTuneTrial(f"new{gain}")
        scheduler.on_trial_add(None, new)
        top1 = curve[0][1] + gain
        result = {EPOCH: 1, METRIC: top1, CURVE: ((1, top1),)}
        assert scheduler.on_trial_result(None, new, result) == expected


def test_a_trial_that_goes_on_is_not_judged_anew_where_it_was() -> None:
    config = SchedulerConfig(kind=SchedulerKind.ASHA, reduction_factor=3)
    past = [
        PastTrial(
            point=TrialPoint(trial=str(number), index=number, values={}),
            state=TrialState.FINISHED,
            top1=0.9,
            epochs=((1, 0.8), (2, 0.8), (3, 0.9)),
        )
        for number in range(3)
    ]
    scheduler = _scheduler(config, past)
    resumed = _PastTuneTrial("resumed")
    scheduler.on_trial_add(None, resumed)
    curve = ((1, 0.1), (2, 0.15), (3, 0.95))
    results = (
        {CURVE: curve[:1]},
        {EPOCH: 2, METRIC: 0.15, CURVE: curve[:2]},
        {EPOCH: 3, METRIC: 0.95, CURVE: curve},
    )
    for result in results:
        assert scheduler.on_trial_result(None, resumed, result) == TrialScheduler.CONTINUE
