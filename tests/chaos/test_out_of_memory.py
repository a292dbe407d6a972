"""The memory of a node runs out, and Ray's own monitor ends a worker in the middle of a slice."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ray._private.utils import get_system_memory, get_used_memory

from chaos_jobs import SLICE_ROWS, ChaosBucket, FaultTable, busy_workers, wait_for
from command_lines import TIMEOUT_S
from fault_proxy import Delay, FaultProxy, FaultRule
from process_table import process_table
from ray_nodes import raylet_of, running_nodes

pytestmark = [pytest.mark.integration, pytest.mark.chaos, pytest.mark.slow]

SLOW_IMAGES = FaultRule(method="GET", key="images/", action=Delay(0.3))
NUM_SLICES = 12
# What is between the memory that is used before and the limit, and by how much another process then exceeds it.
ROOM_BYTES, EXCESS_BYTES = 4 << 30, 1 << 30
HOG = "import sys; memory = b'x' * int(sys.argv[1]); print('full', flush=True); sys.stdin.read()"


@contextmanager
def used_memory(num_bytes: int) -> Iterator[None]:
    """A process that holds so much memory until the block ends."""
    with subprocess.Popen(
        [sys.executable, "-c", HOG, str(num_bytes)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as hog:
        try:
            assert hog.stdout is not None
            assert hog.stdout.readline() == "full\n"
            yield
        finally:
            hog.kill()


def test_a_worker_that_the_memory_monitor_ends_costs_only_its_slice(
    s3_behind_proxy: FaultProxy, tmp_path: Path, fault_table: FaultTable
) -> None:
    bucket = ChaosBucket(s3_behind_proxy, tmp_path, num_images=NUM_SLICES * SLICE_ROWS)
    clean = bucket.new_job("score")
    finished = clean.start()
    assert finished.returncode == 0, finished.stderr
    total = get_system_memory()
    if total - get_used_memory() < 2 * (ROOM_BYTES + EXCESS_BYTES):
        pytest.skip(f"needs {2 * (ROOM_BYTES + EXCESS_BYTES) >> 30} GiB of free memory")
    monitor = {
        "memory_usage_threshold": (get_used_memory() + ROOM_BYTES) / total,
        "memory_monitor_refresh_ms": 100,
    }
    with running_nodes(2, system_config=monitor) as cluster:
        job = bucket.new_job("score", {"RAY_ADDRESS": cluster.address})
        job = job.changed("extraction.num_workers=1", "extraction.num_fetch_threads=4")
        raylet = raylet_of(cluster.head_node)
        environment = {**os.environ, **job.environment}
        with (
            s3_behind_proxy.injecting(SLOW_IMAGES),
            subprocess.Popen(
                job.command(), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            ) as process,
        ):
            try:
                wait_for(lambda: job.num_records() >= 3 and bool(busy_workers(ancestor=raylet)), process)
                before = job.attempts()
                victims = busy_workers(ancestor=raylet)
                with used_memory(ROOM_BYTES + EXCESS_BYTES):
                    wait_for(lambda: not process_table().keys() & set(victims), process)
                _, stderr = process.communicate(timeout=TIMEOUT_S)
            finally:
                process.kill()
        assert process.returncode == 0, stderr
    after = job.attempts()
    assert {name: after[name] for name in before} == before
    assert len(before) < NUM_SLICES
    fault_table.add(
        "F5 a worker ended by Ray's memory monitor, score",
        fired=len(victims),
        audit=job.audit(),
        clean_digest=clean.audit().digest,
    )
