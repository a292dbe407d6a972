"""Which Ray a job uses."""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray
from ray._private.ray_constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
from ray._raylet import GcsClient
from ray.util import placement_group

from convoy.cluster import network_device
from convoy.cluster.growth import CPUS_VARIABLE, GPUS_VARIABLE, ClusterSize, grow_cluster
from convoy.cluster.network_device import find_device, known_device
from convoy.cluster.session import ray_session
from convoy.cluster.slices import plan_pool
from convoy.core.errors import ClusterError, ConfigError
from convoy.vision.engine_options import device_here
from ray_nodes import running_nodes

pytestmark = pytest.mark.integration

_SCRIPT = """
import ray
from convoy.cluster.session import ray_session
with ray_session():
    print(ray.get_runtime_context().gcs_address)
"""


def test_without_an_address_no_other_cluster_of_the_machine_is_joined() -> None:
    # Short, because Ray makes sockets below it. `ray start` leaves such a file behind, also when it was killed.
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        pointer = Path(folder, "ray", "ray_current_cluster")
        pointer.parent.mkdir()
        pointer.write_text("127.0.0.1:1")
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        finished = subprocess.run(
            [sys.executable, "-c", _SCRIPT],
            env={**environment, "RAY_TMPDIR": folder},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip() != "127.0.0.1:1"


_FAULTS_SCRIPT = """
import resource
import threading
import numpy as np
import ray
from convoy.cluster.session import ray_session
from convoy.core.processes import keep_freed_memory

def faults_of_ten_rounds():
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for _ in range(10):
        np.ones(10_000_000)
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before

@ray.remote(num_cpus=0)
class Worker:
    def most_faults(self):
        keep_freed_memory()
        found = []
        for _ in range(4):
            thread = threading.Thread(target=lambda: (faults_of_ten_rounds(), found.append(faults_of_ten_rounds())))
            thread.start()
            thread.join()
        return max(found)

with ray_session():
    print(ray.get(Worker.remote().most_faults.remote()))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told what to keep")
def test_threads_of_workers_use_large_blocks_again_without_the_kernel() -> None:
    """Where Ray's own threads had the pools of memory first, every layer of a network got its pages from the kernel."""
    finished = subprocess.run(
        [sys.executable, "-c", _FAULTS_SCRIPT],
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    one_round_pages = 80_000_000 // resource.getpagesize()
    assert int(finished.stdout) < one_round_pages / 10


def test_an_address_of_a_dashboard_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with pytest.raises(ConfigError, match="convoy submit"), ray_session():
        pass


def test_a_job_asks_for_machines_where_there_are_none_and_goes_on_when_they_join(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a cluster that has shrunk to its head; the test is the autoscaler."""
    with running_nodes(0) as cluster, ThreadPoolExecutor() as pool:
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        monkeypatch.setenv(CPUS_VARIABLE, "3")
        monkeypatch.setenv(GPUS_VARIABLE, "1")

        def job() -> tuple[float, float]:
            with ray_session():
                return ray.cluster_resources()["CPU"], plan_pool(None).num_gpus

        running = pool.submit(job)
        while not (bundles := _requested(cluster.gcs_address)):
            assert not running.done(), running.result()
            time.sleep(0.1)
        assert bundles == [{"CPU": 1}] * 3 + [{"GPU": 1}]
        cluster.add_node(num_cpus=1)
        cluster.add_node(num_cpus=2, num_gpus=1)
        num_cpus, gpus_an_operator = running.result(timeout=60)
        assert num_cpus == 3
        assert gpus_an_operator > 0
        assert _requested(cluster.gcs_address) == []


def test_a_cluster_that_does_not_grow_is_an_error_with_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    with running_nodes(1) as cluster:
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        with ray_session(), pytest.raises(ClusterError, match=r"1 CPUs and 0 GPUs where 2 and 0"):
            grow_cluster(ClusterSize(2, 0), timeout_s=2)
        assert _requested(cluster.gcs_address) == []


@pytest.mark.parametrize("num_gpus", [0, 1])
def test_a_worker_of_a_cluster_says_what_it_runs_networks_on(
    monkeypatch: pytest.MonkeyPatch, num_gpus: int
) -> None:
    """The head has no CPU for tasks; all is one machine, so the answer is the driver's own."""
    with running_nodes(0) as cluster:
        cluster.add_node(num_cpus=1, num_gpus=num_gpus)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        assert known_device() is None
        assert find_device() == device_here().model_copy(update={"num_cpus": 1})


def test_gpus_that_others_hold_are_not_waited_for_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network_device, "_TIMEOUT_S", 1.0)
    with running_nodes(0) as cluster:
        cluster.add_node(num_cpus=1, num_gpus=1)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        with ray_session():
            held = placement_group([{"GPU": 1}])
            ray.get(held.ready())
            device = find_device()
    assert device.is_gpu
    assert device.has_compiler is None
    assert "none was free to be asked" in device.name


def _requested(gcs_address: str) -> list[dict[str, float]]:
    """What is asked of the autoscaler."""
    text = GcsClient(address=gcs_address).internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL, None)
    return [] if text is None else list(json.loads(text))
