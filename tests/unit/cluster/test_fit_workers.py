from __future__ import annotations

from typing import Any

import pytest
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

from convoy.cluster import training
from convoy.cluster.training import TrialWorkers, WorkerOptions, fit_workers, plan_workers
from convoy.cluster.training_spec import CPUS_A_PREPARER, Ingest
from convoy.core.errors import OBSTACLES, ClusterError, ExitCode, NoRoom


def nodes(*sizes: tuple[float, float]) -> list[dict[str, float]]:
    return [{"CPU": cpus, "GPU": gpus} for cpus, gpus in sizes]


@pytest.mark.parametrize(
    ("sizes", "num_workers", "num_threads", "gpus_per_worker", "ingest"),
    [
        # Without GPUs one worker takes the largest node.
        ([(8, 0)], 1, 8, 0, Ingest.FUSED),
        ([(4, 0), (16, 0), (8, 0)], 1, 16, 0, Ingest.FUSED),
        ([(1, 0)], 1, 1, 0, Ingest.FUSED),
        # With GPUs one worker a GPU; processes beside it prepare its images.
        ([(16, 1)], 1, 2, 1, Ingest.SPLIT),
        ([(32, 4), (32, 4)], 8, 2, 1, Ingest.SPLIT),
        ([(64, 8), (4, 1)], 9, 2, 1, Ingest.SPLIT),
        # Few CPUs a GPU: threads of the worker. The node with the fewest decides.
        ([(8, 4)], 4, 2, 1, Ingest.FUSED),
        ([(8, 8), (64, 1)], 9, 1, 1, Ingest.FUSED),
        # Nodes without GPUs prepare images too; a head node without CPUs cannot.
        ([(2, 1), (32, 0)], 1, 2, 1, Ingest.SPLIT),
        ([(0, 0), (2, 1)], 1, 2, 1, Ingest.FUSED),
        ([(0, 0), (8, 0)], 1, 8, 0, Ingest.FUSED),
        # Nor can a worker use a GPU that has no CPU beside it.
        ([(16, 1), (0, 1)], 1, 2, 1, Ingest.SPLIT),
        ([(8, 0), (0.5, 1)], 1, 8, 0, Ingest.FUSED),
        # But not where a GPU has one CPU, which suffices for a worker of one thread.
        ([(1, 1)], 1, 1, 1, Ingest.FUSED),
        ([(1, 1), (16, 0)], 1, 1, 1, Ingest.FUSED),
        ([(4, 4), (64, 0)], 4, 1, 1, Ingest.FUSED),
    ],
)
def test_defaults_follow_the_cluster(
    sizes: list[tuple[float, float]], num_workers: int, num_threads: int, gpus_per_worker: int, ingest: Ingest
) -> None:
    plan = fit_workers(WorkerOptions(), nodes(*sizes))
    assert plan is not None
    assert (plan.num_workers, plan.num_threads) == (num_workers, num_threads)
    assert (plan.gpus_per_worker, plan.ingest) == (gpus_per_worker, ingest)
    # Something is left for Ray's own tasks.
    assert 0 < plan.cpus_per_worker < num_threads


@pytest.mark.parametrize(
    ("options", "sizes", "expected"),
    [
        ({"num_workers": 2}, [(8, 0)], (2, 4)),
        ({"num_workers": 3}, [(8, 0), (4, 0)], (3, 4)),
        ({"num_workers": 2, "cpus_per_worker": 3}, [(8, 0)], (2, 3)),
        ({"num_workers": 1, "ingest": "fused"}, [(8, 1), (8, 1)], (1, 8)),
        # Two threads share a CPU rather than not train.
        ({"num_workers": 2}, [(1, 0)], (2, 1)),
    ],
)
def test_explicit_numbers_are_taken(
    options: dict[str, Any], sizes: list[tuple[float, float]], expected: tuple[int, int]
) -> None:
    plan = fit_workers(WorkerOptions.model_validate(options), nodes(*sizes))
    assert plan is not None
    assert (plan.num_workers, plan.num_threads) == expected


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({}, []),
        ({}, [(0, 0)]),
        ({"num_workers": 5}, [(2, 0)]),
        ({"cpus_per_worker": 9}, [(8, 0), (8, 0)]),
        ({"num_workers": 3}, [(64, 2)]),
        ({"num_workers": 2, "cpus_per_worker": 8}, [(8, 2), (64, 0)]),
    ],
)
def test_what_the_cluster_cannot_hold_is_no_plan(
    options: dict[str, int], sizes: list[tuple[float, float]]
) -> None:
    assert fit_workers(WorkerOptions.model_validate(options), nodes(*sizes)) is None


def test_an_explicit_ingest_is_taken() -> None:
    for ingest in (Ingest.FUSED, Ingest.SPLIT):
        plan = fit_workers(WorkerOptions(ingest=ingest, preparers_per_worker=3), nodes((8, 1), (8, 0)))
        assert plan is not None
        assert (plan.ingest, plan.preparers_per_worker) == (ingest, 3)


@pytest.mark.parametrize(
    ("sizes", "num_workers", "num_preparers"),
    [
        # A worker takes half a CPU less than its threads, a preparer half a CPU.
        ([(2, 0)], 1, 1),
        ([(2, 0)], 2, 1),
        ([(3, 0)], 2, 1),
        ([(8, 2), (2, 0)], 2, 3),
        ([(8, 2), (64, 0)], 2, 16),
    ],
)
def test_the_preparers_of_all_workers_fit_beside_the_workers(
    sizes: list[tuple[float, float]], num_workers: int, num_preparers: int
) -> None:
    """Otherwise those of one worker would wait for those of another, which waits for that worker."""
    plan = fit_workers(WorkerOptions(ingest=Ingest.SPLIT, num_workers=num_workers), nodes(*sizes))
    assert plan is not None
    assert plan.preparers_per_worker == num_preparers
    reserved = num_workers * (plan.cpus_per_worker + num_preparers * CPUS_A_PREPARER)
    assert reserved <= sum(cpus for cpus, _ in sizes)


def test_workers_that_leave_no_cpu_for_preparers_are_no_plan() -> None:
    assert fit_workers(WorkerOptions(ingest=Ingest.SPLIT, num_workers=2), nodes((1, 0))) is None


def with_stores(*stores_gb: float) -> list[dict[str, float]]:
    """Nodes of 16 CPUs and a GPU, with so much memory for Ray's objects."""
    return [{"CPU": 16.0, "GPU": 1.0, "object_store_memory": gb * 1e9} for gb in stores_gb]


# 256 images of 224 pixels: for each of 14 processes three batches may lie in Ray's object store, 1.6 GB.
BATCH_BYTES = 256 * 3 * 224**2


@pytest.mark.parametrize(
    ("stores_gb", "ingest", "num_threads"),
    [
        # Half of the store is for them.
        ([3.3], Ingest.SPLIT, 2),
        ([3.2], Ingest.FUSED, 16),
        ([0.268], Ingest.FUSED, 16),
        # Two workers have as much each, and what one node lacks another has.
        ([6.5, 0.1], Ingest.SPLIT, 2),
        ([3.2, 3.2], Ingest.FUSED, 16),
    ],
)
def test_batches_that_the_object_store_cannot_hold_are_prepared_by_threads(
    stores_gb: list[float], ingest: Ingest, num_threads: int
) -> None:
    plan = fit_workers(WorkerOptions(), with_stores(*stores_gb), batch_bytes=BATCH_BYTES)
    assert plan is not None
    assert (plan.num_workers, plan.ingest, plan.num_threads) == (len(stores_gb), ingest, num_threads)


def test_a_split_ingest_that_was_asked_for_is_taken_whatever_the_object_store() -> None:
    plan = fit_workers(WorkerOptions(ingest=Ingest.SPLIT), with_stores(0.268), batch_bytes=BATCH_BYTES)
    assert plan is not None
    assert plan.ingest is Ingest.SPLIT


@pytest.mark.parametrize(
    ("sizes", "num_workers", "cpus_beside", "num_threads"),
    [
        # Half a CPU that a worker does not ask for is enough for a few.
        ([(4, 0)], 1, 0.1, 4),
        ([(4, 0)], 1, 0.6, 3),
        # They may be taken from any of the nodes.
        ([(4, 0), (4, 0)], 2, 0.6, 3),
        ([(2, 0)], 4, 0.1, None),
    ],
)
def test_workers_leave_room_for_the_processes_beside_them(
    sizes: list[tuple[float, float]], num_workers: int, cpus_beside: float, num_threads: int | None
) -> None:
    plan = fit_workers(WorkerOptions(num_workers=num_workers), nodes(*sizes), cpus_beside=cpus_beside)
    assert (plan and plan.num_threads) == num_threads


def test_the_workers_of_a_trial_are_where_its_search_planned_them() -> None:
    """Not on CPUs because GPUs are gone for a while, nor the other way round."""
    on_gpus, on_cpus = (TrialWorkers(num_workers=1, on_gpus=value) for value in (True, False))
    assert fit_workers(on_gpus, nodes((8, 0))) is None
    with_gpus = [fit_workers(workers, nodes((8, 1))) for workers in (on_gpus, on_cpus)]
    assert [plan and plan.gpus_per_worker for plan in with_gpus] == [1, 0]


def test_workers_wait_for_gpus_that_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = iter([nodes((8, 0)), nodes((8, 0)), nodes((8, 1))])
    monkeypatch.setattr(training, "alive_nodes", lambda: next(seen))
    monkeypatch.setattr(training.time, "sleep", lambda seconds: None)
    assert plan_workers(TrialWorkers(num_workers=1, on_gpus=True)).gpus_per_worker == 1


def test_a_group_that_no_node_can_hold_has_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "alive_nodes", lambda: nodes((8, 0)))
    with pytest.raises(
        NoRoom, match="1 workers of 2 CPUs and a GPU each: after 0 s it has 8 CPUs and 0 GPUs"
    ):
        plan_workers(TrialWorkers(num_workers=1, cpus_per_worker=2, on_gpus=True), timeout_s=0)
    # Which is nobody's fault: it ends no trial, and the same command goes on.
    assert NoRoom in OBSTACLES
    assert NoRoom.exit_code is ExitCode.STOPPED_RESUMABLE


def test_a_group_without_room_for_lack_of_gpus_says_that_it_takes_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(training, "alive_nodes", lambda: nodes((8, 1)))
    with pytest.raises(
        NoRoom, match="2 workers of 1 CPUs and a GPU each: after 0 s it has 8 CPUs and 1 GPUs"
    ):
        plan_workers(WorkerOptions(num_workers=2), timeout_s=0)
    monkeypatch.setattr(training, "alive_nodes", lambda: nodes((8, 0), (0, 1)))
    with pytest.raises(NoRoom, match="17 workers of 1 CPUs: after"):
        plan_workers(WorkerOptions(num_workers=17), timeout_s=0)


@pytest.mark.parametrize(
    ("cpus_left", "error", "kind", "words"),
    [
        (8, ControllerError(WorkerGroupStartupTimeoutError(2)), NoRoom, "no room came free for 2 workers"),
        (
            2,
            ControllerError(WorkerGroupStartupTimeoutError(2)),
            NoRoom,
            "cannot hold 2 workers of 2 CPUs any",
        ),
        (2, WorkerGroupError("lost", {0: ValueError("lost")}), NoRoom, "it has 2 CPUs and 0 GPUs"),
        (8, WorkerGroupError("lost", {0: ValueError("lost")}), ClusterError, "lost"),
    ],
)
def test_a_group_that_failed_says_whether_it_had_no_room(
    monkeypatch: pytest.MonkeyPatch, cpus_left: float, error: Exception, kind: type[ClusterError], words: str
) -> None:
    plan = fit_workers(WorkerOptions(num_workers=2, cpus_per_worker=2), nodes((8, 0)))
    assert plan is not None
    monkeypatch.setattr(training, "alive_nodes", lambda: nodes((cpus_left, 0)))
    explained = training._explained(error, plan)
    assert type(explained) is kind
    assert words in explained.what
