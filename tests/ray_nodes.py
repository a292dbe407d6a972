"""Several nodes on one machine: a raylet each, in one cluster, and which of them has which of Ray's workers."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ray.cluster_utils import Cluster

from process_table import process_table

# With these a dead node is found within two seconds.
HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}


@contextmanager
def running_nodes(
    num_head_cpus: int, *more_cpus: int, system_config: Mapping[str, Any] | None = None
) -> Iterator[Cluster]:
    """A cluster of a head node and others with so many CPUs each; it ends with the block."""
    head = {"num_cpus": num_head_cpus, "num_gpus": 0, "include_dashboard": False}
    cluster = Cluster(
        initialize_head=True, head_node_args={**head, "_system_config": dict(system_config or {})}
    )
    try:
        for num_cpus in more_cpus:
            cluster.add_node(num_cpus=num_cpus, num_gpus=0)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        cluster.shutdown()


def raylet_of(node: Any) -> int:
    """The process id of a node's raylet, which is the parent of all workers of the node."""
    (raylet,) = node.all_processes["raylet"]
    return int(raylet.process.pid)


class PlacementWatch:
    """A thread that notes the titles that Ray gives its workers, by the raylet that has them, while its block runs.

    Of raylets that this process has started: others of the machine belong to somebody else's work.
    """

    def __init__(self) -> None:
        self._seen: set[tuple[int, str]] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> PlacementWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def raylets_with(self, title: str) -> set[int]:
        """The process ids of the raylets that had workers whose titles match the pattern."""
        return {raylet for raylet, seen in self._seen if re.search(title, seen)}

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            processes = process_table()
            for process in processes.values():
                raylet = processes.get(process.parent)
                if raylet and raylet.parent == os.getpid() and process.title.startswith("ray::"):
                    self._seen.add((process.parent, process.title))
