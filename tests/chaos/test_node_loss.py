"""A node of a cluster dies under a job; and then the whole cluster, with its head."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import pytest
from ray.cluster_utils import Cluster

from chaos_jobs import SLICE_ROWS, ChaosBucket, ChaosJob, FaultTable, busy_workers, wait_for
from command_lines import TIMEOUT_S
from convoy.core.errors import ExitCode
from fault_proxy import Delay, FaultProxy, FaultRule
from ray_nodes import HEALTH_CHECKS, running_nodes

pytestmark = [pytest.mark.integration, pytest.mark.chaos, pytest.mark.slow]

SLOW_IMAGES = FaultRule(method="GET", key="images/", action=Delay(0.3))
NUM_SLICES = 16
SPREAD = ("extraction.num_workers=2", "extraction.num_fetch_threads=4")


def two_nodes() -> AbstractContextManager[Cluster]:
    """A head node without CPUs, for the driver, and two nodes that hold a worker each."""
    return running_nodes(0, 2, 2, system_config=HEALTH_CHECKS)


@pytest.fixture
def cluster(s3_behind_proxy: FaultProxy) -> Iterator[Cluster]:
    with two_nodes() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def bucket(s3_behind_proxy: FaultProxy, tmp_path_factory: pytest.TempPathFactory) -> ChaosBucket:
    folder = tmp_path_factory.mktemp("images")
    return ChaosBucket(s3_behind_proxy, folder, num_images=NUM_SLICES * SLICE_ROWS)


@pytest.fixture(scope="module")
def clean_digests(bucket: ChaosBucket) -> Mapping[str, str]:
    """Of the rows of each job that nothing disturbs."""
    digests = {}
    for verb in ("cache", "score"):
        job = bucket.new_job(verb)
        finished = job.start()
        assert finished.returncode == 0, finished.stderr
        digests[verb] = job.audit().digest
    return digests


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


@pytest.mark.parametrize("verb", ["cache", "score"])
def test_a_node_that_dies_costs_only_the_slices_it_had(
    verb: str,
    cluster: Cluster,
    bucket: ChaosBucket,
    clean_digests: Mapping[str, str],
    s3_behind_proxy: FaultProxy,
    fault_table: FaultTable,
) -> None:
    job = bucket.new_job(verb, {"RAY_ADDRESS": cluster.address}).changed(*SPREAD)
    with s3_behind_proxy.injecting(SLOW_IMAGES), begun(job) as process:
        node = next(iter(cluster.worker_nodes))
        (raylet,) = node.all_processes["raylet"]
        wait_for(lambda: bool(busy_workers(ancestor=raylet.process.pid)), process)
        before = job.attempts()
        cluster.remove_node(node, allow_graceful=False)
        cluster.add_node(num_cpus=2)
        _, stderr = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, stderr
    assert len(before) < NUM_SLICES, "the job ended before the fault"
    after = job.attempts()
    assert {name: after[name] for name in before} == before
    fault_table.add(f"F3 a node killed, {verb}", fired=1, audit=job.audit(), clean_digest=clean_digests[verb])


def test_a_cluster_that_dies_leaves_what_was_finished(
    bucket: ChaosBucket,
    clean_digests: Mapping[str, str],
    s3_behind_proxy: FaultProxy,
    fault_table: FaultTable,
) -> None:
    with s3_behind_proxy.injecting(SLOW_IMAGES), two_nodes() as cluster:
        job = bucket.new_job("cache", {"RAY_ADDRESS": cluster.address}).changed(*SPREAD)
        with begun(job) as process:
            head = cluster.head_node
            assert head is not None
            head.kill_all_processes(check_alive=False, allow_graceful=False)
            _, stderr = process.communicate(timeout=TIMEOUT_S)
            assert process.returncode == ExitCode.STOPPED_RESUMABLE, stderr
    assert "the head of the Ray cluster" in stderr
    assert "Traceback" not in stderr
    before = job.attempts()
    assert 4 <= len(before) < NUM_SLICES
    finished = bucket_job_here(job)
    assert finished.returncode == 0, finished.stderr
    after = job.attempts()
    assert {name: after[name] & before[name] for name in before} == before
    audit = job.audit()
    fault_table.add(
        "F4 the head node killed, cache", fired=1, audit=audit, clean_digest=clean_digests["cache"]
    )


def bucket_job_here(job: ChaosJob) -> subprocess.CompletedProcess[str]:
    """The same command again, on a Ray of its own."""
    return ChaosJob(job.verb, job.workspace, job.settings).start()
