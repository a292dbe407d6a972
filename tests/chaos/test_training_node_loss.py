"""A node dies under a training of two workers, each on a node of its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from command_lines import TIMEOUT_S, last_json
from ray_nodes import HEALTH_CHECKS, running_nodes
from train_jobs import TrainJob, frozen_digits
from training_faults import (
    IN_BODY_PHASE,
    NUM_STEPS,
    begun,
    made_training,
    step_of,
    wait_for_checkpoint,
)

pytestmark = [pytest.mark.integration, pytest.mark.chaos, pytest.mark.slow]

# A group that cannot start gives up soon.
START_TIMEOUT = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10"}
# A worker asks for 1.5 of the 2 CPUs of a node, so that each has one of its own.
TWO_WORKERS = "workers={num_workers: 2, cpus_per_worker: 2}"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head node without CPUs, for the driver and Ray Train's controller; tests add the others."""
    with running_nodes(0, system_config=HEALTH_CHECKS) as cluster:
        yield cluster


@pytest.fixture
def two_nodes(cluster: Cluster) -> Cluster:
    """The cluster with two nodes that can hold a worker."""
    while len(cluster.worker_nodes) < 2:
        cluster.add_node(num_cpus=2)
    return cluster


@pytest.fixture(scope="module")
def new_job(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], TrainJob]:
    workspace = frozen_digits(tmp_path_factory.mktemp("digits"))

    def make(folder: Path) -> TrainJob:
        return made_training(workspace, folder, cluster.address).changed(TWO_WORKERS)

    return make


@pytest.fixture(scope="module")
def undisturbed_losses(
    new_job: Callable[[Path], TrainJob], cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> list[float]:
    while len(cluster.worker_nodes) < 2:
        cluster.add_node(num_cpus=2)
    return losses(new_job(tmp_path_factory.mktemp("undisturbed")).run())


def losses(report: dict[str, Any]) -> list[float]:
    return [epoch[name] for epoch in report["history"] for name in ("train_loss", "val_nll")]


def kill_a_node(cluster: Cluster, job: TrainJob) -> None:
    """SIGKILL all processes of one of the nodes that hold the group."""
    assert step_of(job.checkpoints()[0]) < NUM_STEPS, "the training ended before the fault"
    cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)


def test_the_group_goes_on_when_another_node_takes_the_place_of_the_lost_one(
    two_nodes: Cluster,
    new_job: Callable[[Path], TrainJob],
    undisturbed_losses: list[float],
    tmp_path: Path,
) -> None:
    job = new_job(tmp_path)
    with begun(job) as process:
        wait_for_checkpoint(job, IN_BODY_PHASE, process)
        kill_a_node(two_nodes, job)
        two_nodes.add_node(num_cpus=2)
        stdout, stderr = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, stderr
    assert "going on from the checkpoint of step" in stderr
    report = json.loads(stdout.splitlines()[-1])
    assert losses(report) == pytest.approx(undisturbed_losses, rel=1e-4)


def test_a_cluster_that_cannot_hold_the_group_any_more_says_so_and_fewer_workers_go_on(
    two_nodes: Cluster,
    new_job: Callable[[Path], TrainJob],
    undisturbed_losses: list[float],
    tmp_path: Path,
) -> None:
    job = new_job(tmp_path).changed("workers.max_failures=1")
    impatient = replace(job, environment={**job.environment, **START_TIMEOUT})
    with begun(impatient) as process:
        wait_for_checkpoint(job, IN_BODY_PHASE, process)
        kill_a_node(two_nodes, job)
        _, stderr = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 4
    assert "the cluster cannot hold 2 workers of 2 CPUs any more: it has " in stderr
    assert "2 CPUs and 0 GPUs" in stderr
    assert "run the same command again to go on" in stderr
    assert "Traceback" not in stderr
    newest = job.checkpoints()[0]
    finished = job.changed("workers.num_workers=1").start()
    assert finished.returncode == 0, finished.stderr
    assert f"going on from the checkpoint of step {newest.step}" in finished.stderr
    assert losses(last_json(finished)) == pytest.approx(undisturbed_losses, rel=1e-4)
