"""A node of a cluster dies under a job; and then the whole cluster, with its head."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from ray.cluster_utils import Cluster

from cache_jobs import TIMEOUT_S
from chaos_jobs import SLICE_ROWS, ChaosBucket, ChaosJob, FaultTable, wait_for
from fault_proxy import Delay, FaultProxy, FaultRule

pytestmark = [pytest.mark.integration, pytest.mark.chaos, pytest.mark.slow]

SLOW_IMAGES = FaultRule(method="GET", key="images/", action=Delay(0.3))
NUM_SLICES = 16
# A dead node is found within two seconds.
HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}
SPREAD = ("extraction.num_workers=2", "extraction.num_fetch_threads=4")


@contextmanager
def two_nodes() -> Iterator[Cluster]:
    """A head node without CPUs, for the driver, and two nodes that hold a worker each."""
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": HEALTH_CHECKS}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _node in range(2):
            cluster.add_node(num_cpus=2)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        cluster.shutdown()


@pytest.fixture
def cluster(s3_behind_proxy: FaultProxy) -> Iterator[Cluster]:
    with two_nodes() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def bucket(s3_behind_proxy: FaultProxy, tmp_path_factory: pytest.TempPathFactory) -> ChaosBucket:
    folder = tmp_path_factory.mktemp("images")
    return ChaosBucket(s3_behind_proxy, folder, num_images=NUM_SLICES * SLICE_ROWS)


@pytest.fixture(scope="module")
def clean_digest(bucket: ChaosBucket) -> str:
    job = bucket.new_job("cache")
    finished = job.start()
    assert finished.returncode == 0, finished.stderr
    return job.audit().digest


@contextmanager
def begun(job: ChaosJob) -> Iterator[subprocess.Popen[str]]:
    """The command in a process of its own, which does not outlive the test, with some slices done."""
    environment = {**os.environ, **job.environment}
    with subprocess.Popen(
        job.command(), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            wait_for(lambda: job.num_records() >= 4, process)
            yield process
        finally:
            process.kill()


def test_a_node_that_dies_costs_only_the_slices_it_had(
    cluster: Cluster,
    bucket: ChaosBucket,
    clean_digest: str,
    s3_behind_proxy: FaultProxy,
    fault_table: FaultTable,
) -> None:
    job = bucket.new_job("cache", {"RAY_ADDRESS": cluster.address}).changed(*SPREAD)
    with s3_behind_proxy.injecting(SLOW_IMAGES), begun(job) as process:
        before = job.attempts()
        cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
        cluster.add_node(num_cpus=2)
        _, stderr = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, stderr
    assert len(before) < NUM_SLICES, "the job ended before the fault"
    after = job.attempts()
    assert {name: after[name] for name in before} == before
    fault_table.add("F3 a node killed, cache", fired=1, audit=job.audit(), clean_digest=clean_digest)


def test_a_cluster_that_dies_leaves_what_was_finished(
    bucket: ChaosBucket, clean_digest: str, s3_behind_proxy: FaultProxy, fault_table: FaultTable
) -> None:
    with s3_behind_proxy.injecting(SLOW_IMAGES), two_nodes() as cluster:
        job = bucket.new_job("cache", {"RAY_ADDRESS": cluster.address}).changed(*SPREAD)
        with begun(job) as process:
            head = cluster.head_node
            assert head is not None
            head.kill_all_processes(check_alive=False, allow_graceful=False)
            _, stderr = process.communicate(timeout=TIMEOUT_S)
            assert process.returncode not in {None, 0}, stderr
    before = job.attempts()
    assert 4 <= len(before) < NUM_SLICES
    finished = bucket_job_here(job)
    assert finished.returncode == 0, finished.stderr
    after = job.attempts()
    assert {name: after[name] & before[name] for name in before} == before
    fault_table.add("F4 the head node killed, cache", fired=1, audit=job.audit(), clean_digest=clean_digest)


def bucket_job_here(job: ChaosJob) -> subprocess.CompletedProcess[str]:
    """The same command again, on a Ray of its own."""
    return ChaosJob(job.verb, job.workspace, job.settings).start()
