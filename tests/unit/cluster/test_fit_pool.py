from __future__ import annotations

import pytest

from convoy.cluster import slices
from convoy.cluster.slices import NodeSize, PlannedWork, fit_pool, plan_pool
from convoy.core.errors import ClusterError


@pytest.mark.parametrize(
    ("sizes", "num_workers", "num_gpus", "num_threads"),
    [
        # Without GPUs one operator a node.
        ([(2, 0)], 1, 0, 2),
        ([(8, 0), (8, 0)], 2, 0, 8),
        # One for every four CPUs beside a GPU, at most four.
        ([(16, 1)], 4, 0.25, 4),
        ([(64, 1)], 4, 0.25, 16),
        ([(32, 4)], 8, 0.5, 4),
        # The node with the fewest CPUs a GPU decides; nodes without GPUs hold none.
        ([(16, 4), (64, 4)], 8, 1, 4),
        ([(2, 1), (64, 0)], 1, 1, 2),
        ([(1, 2)], 2, 1, 1),
    ],
)
def test_operators_follow_the_cluster(
    sizes: list[tuple[int, int]], num_workers: int, num_gpus: float, num_threads: int
) -> None:
    nodes = [NodeSize(*size) for size in sizes]
    pool = fit_pool(None, nodes)
    assert (pool.num_workers, pool.num_gpus, pool.num_threads) == (num_workers, num_gpus, num_threads)
    assert pool.num_cpus * pool.num_workers < sum(node.cpus for node in nodes)


def test_an_explicit_number_of_operators_shares_the_gpus() -> None:
    assert fit_pool(3, [NodeSize(16, 2)]).num_gpus == 0.5
    assert fit_pool(2, [NodeSize(16, 2)]).num_gpus == 1
    assert fit_pool(1, [NodeSize(16, 2)]).num_gpus == 1


def has_nodes(monkeypatch: pytest.MonkeyPatch, *sizes: tuple[float, float]) -> None:
    alive = [{"CPU": cpus, "GPU": gpus, "memory": 0.0} for cpus, gpus in sizes]
    monkeypatch.setattr(slices, "alive_nodes", lambda: alive)


def test_a_cluster_without_cpus_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    has_nodes(monkeypatch, (0, 0), (0.5, 2))
    with pytest.raises(ClusterError, match="no node offers a CPU"):
        plan_pool(None)


@pytest.mark.parametrize("useless", [(0, 0), (0, 2), (0.5, 2)])
@pytest.mark.parametrize(
    ("size", "num_workers", "num_gpus", "num_threads"), [((8, 0), 1, 0, 8), ((16, 1), 4, 0.25, 4)]
)
def test_a_node_without_a_cpu_holds_no_operator_whatever_gpus_it_has(
    monkeypatch: pytest.MonkeyPatch,
    useless: tuple[float, float],
    size: tuple[float, float],
    num_workers: int,
    num_gpus: float,
    num_threads: int,
) -> None:
    has_nodes(monkeypatch, useless, size)
    pool = plan_pool(None)
    assert (pool.num_workers, pool.num_gpus, pool.num_threads) == (num_workers, num_gpus, num_threads)


def test_an_operator_may_be_given_its_share_of_the_cpus() -> None:
    """So that the trials of a search run side by side."""
    pool = fit_pool(1, [NodeSize(8, 0)], 2)
    assert (pool.num_workers, pool.num_threads, pool.num_cpus) == (1, 2, 1.5)
    assert fit_pool(1, [NodeSize(16, 2)], 4).num_threads == 4


@pytest.mark.parametrize(("num_slices", "num_workers"), [(5, 8), (10, 8), (25, 24), (32, 32), (1000, 32)])
def test_few_slices_are_shared_out_among_all_gpus(num_slices: int, num_workers: int) -> None:
    """Operators of a quarter of a GPU, of which there are ten, Ray puts on three of eight GPUs."""
    pool = fit_pool(None, [NodeSize(192, 8)], work=PlannedWork(10_000, num_slices=num_slices))
    assert (pool.num_workers, pool.num_gpus) == (num_workers, 8 / num_workers)


GIB = 1 << 30


@pytest.mark.parametrize(
    ("sizes", "num_rows", "num_workers", "num_threads"),
    [
        # Few rows would not make up for the start of a second operator.
        ([(2, 0, 16 * GIB)], 1_999, 1, 2),
        ([(2, 0, 16 * GIB)], 2_000, 2, 1),
        ([(16, 0, 64 * GIB)], 5_000, 5, 3),
        # Then CPUs are the limit, or memory.
        ([(16, 0, 64 * GIB)], 10**6, 16, 1),
        ([(16, 0, 8 * GIB)], 10**6, 4, 4),
        ([(16, 0, 64 * GIB), (8, 0, 0)], 10**6, 17, 1),
    ],
)
def test_many_rows_get_an_operator_for_each_cpu(
    sizes: list[tuple[int, int, int]], num_rows: int, num_workers: int, num_threads: int
) -> None:
    pool = fit_pool(None, [NodeSize(*size) for size in sizes], work=PlannedWork(num_rows))
    assert (pool.num_workers, pool.num_threads) == (num_workers, num_threads)
    assert pool.num_cpus * pool.num_workers < sum(cpus for cpus, *_ in sizes)


@pytest.mark.parametrize(
    ("forward_s", "num_slices", "num_workers", "num_threads"),
    [
        (15.9, 8, 1, 2),
        # Few rows, but each of them goes through many crops and networks.
        (16, 8, 2, 1),
        # An operator without a slice would only take threads from the others.
        (1000, 1, 1, 2),
    ],
)
def test_heavy_networks_get_an_operator_for_each_cpu(
    forward_s: float, num_slices: int, num_workers: int, num_threads: int
) -> None:
    work = PlannedWork(100, num_slices=num_slices, forward_s=forward_s)
    pool = fit_pool(None, [NodeSize(2, 0, 16 * GIB)], work=work)
    assert (pool.num_workers, pool.num_threads) == (num_workers, num_threads)


def test_operators_of_given_threads_share_the_cpus() -> None:
    pool = fit_pool(None, [NodeSize(16, 0, 64 * GIB)], 4, PlannedWork(10**6))
    assert (pool.num_workers, pool.num_threads) == (4, 4)


@pytest.mark.parametrize(
    ("size", "num_nodes", "cpus_per_worker"),
    [
        ((16, 0, 64 * GIB), 2, None),
        ((2, 0, 16 * GIB), 3, None),
        ((16, 0, 8 * GIB), 2, None),
        ((16, 0, 64 * GIB), 2, 2),
        ((3, 0, 16 * GIB), 1, 2),
    ],
)
def test_a_node_takes_no_more_operators_than_it_has_memory_for_when_another_is_lost(
    size: tuple[int, int, int], num_nodes: int, cpus_per_worker: int | None
) -> None:
    cpus, *_ = size
    pool = fit_pool(None, [NodeSize(*size)] * num_nodes, cpus_per_worker, PlannedWork(10**6))
    on_a_node = pool.num_workers // num_nodes
    assert (on_a_node + 1) * pool.num_cpus > cpus
    # Room for Ray's own tasks.
    assert on_a_node * pool.num_cpus <= cpus - 0.5


@pytest.mark.parametrize("sizes", [(1, 16), (2, 5), (7, 8, 9)])
def test_counted_operators_fit_on_nodes_of_unequal_size(sizes: tuple[int, ...]) -> None:
    pool = fit_pool(None, [NodeSize(cpus, 0, 64 * GIB) for cpus in sizes], work=PlannedWork(10**6))
    assert pool.num_workers == sum(sizes)
    for cpus in sizes:
        assert cpus * pool.num_cpus <= cpus - 0.5


def test_more_operators_than_cpus_run_where_they_are_asked_for() -> None:
    pool = fit_pool(4, [NodeSize(2, 0, 16 * GIB)])
    assert (pool.num_threads, pool.num_workers * pool.num_cpus) == (1, 2)


def test_an_operator_has_room_for_its_networks() -> None:
    heavy = PlannedWork(10**6, weights_bytes=3 * GIB)
    assert fit_pool(None, [NodeSize(16, 0, 64 * GIB)], work=heavy).num_workers == 8
