"""What a cluster is to have before a job plans on it: an autoscaler starts no machine that nobody asks for."""

from __future__ import annotations

import logging
import os
import time
from typing import NamedTuple

from convoy.cluster.nodes import alive_nodes
from convoy.core.errors import ConfigError, NoRoom

CPUS_VARIABLE, GPUS_VARIABLE = "CONVOY_CLUSTER_CPUS", "CONVOY_CLUSTER_GPUS"
# A machine with a GPU and its image may take a quarter of an hour.
_TIMEOUT_S = 1200.0
_POLL_S = 1.0

_log = logging.getLogger(__name__)


class ClusterSize(NamedTuple):
    """CPUs and GPUs of all nodes together."""

    cpus: int
    gpus: int

    def covers(self, other: ClusterSize) -> bool:
        """Whether it has as many of both."""
        return self.cpus >= other.cpus and self.gpus >= other.gpus


def size_variables(cpus: int | None, gpus: int | None) -> dict[str, str]:
    """The environment that makes a driver elsewhere ask for so much; None leaves it to that of its machine.

    GPUs alone come with the CPUs beside them: what the machine says of those may be one more machine, which is idle.
    """
    wanted = {CPUS_VARIABLE: 1 if cpus is None and gpus else cpus, GPUS_VARIABLE: gpus}
    return {name: str(number) for name, number in wanted.items() if number is not None}


def wanted_size() -> ClusterSize:
    """What the environment asks for, or else a single CPU. Raises ConfigError for what is no number."""
    return ClusterSize(_number(CPUS_VARIABLE, 1), _number(GPUS_VARIABLE, 0))


def regrow_cluster() -> None:
    """Return when the cluster has what the environment asks for, again; a local Ray is as large as it is.

    For whoever plans some time after the session began: its autoscaler takes machines back that had nothing to do.
    Raises what `grow_cluster` raises.
    """
    if has_shrunk():
        grow_cluster(wanted_size())


def has_shrunk() -> bool:
    """Whether the cluster has less than the environment asks for; a local Ray never has."""
    return bool(os.environ.get("RAY_ADDRESS")) and not _size().covers(wanted_size())


def grow_cluster(wanted: ClusterSize, *, timeout_s: float = _TIMEOUT_S) -> None:
    """Return when the cluster has so much; ask its autoscaler for it where it has not.

    Raises NoRoom with the numbers if it has less after `timeout_s`.
    """
    if _size().covers(wanted):
        return
    _log.warning(
        "waiting for machines: the cluster has not yet %d CPUs and %d GPUs; at most %.0f s",
        *wanted,
        timeout_s,
    )
    try:
        _wait(wanted, timeout_s)
    finally:
        # It would outlive a driver that is killed. Machines that work stay without it.
        _request(ClusterSize(0, 0))


def _wait(wanted: ClusterSize, timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not (size := _size()).covers(wanted):
        # Again and again: a cluster has one such request, and Ray Data and other drivers replace it by theirs.
        _request(wanted)
        if time.monotonic() > deadline_s:
            raise NoRoom(
                f"after {timeout_s:.0f} s the cluster has {size.cpus} CPUs and {size.gpus} GPUs"
                f" where {wanted.cpus} and {wanted.gpus} are wanted",
                next_step="see why no machine joins (`ray status`), or ask for less: `convoy submit` with other --cpus"
                f" or --gpus, or else {CPUS_VARIABLE} or {GPUS_VARIABLE}",
            )
        time.sleep(min(_POLL_S, timeout_s))


def _request(size: ClusterSize) -> None:
    from ray.autoscaler.sdk import request_resources  # noqa: PLC0415

    request_resources(num_cpus=size.cpus, bundles=[{"GPU": 1}] * size.gpus)


def _size() -> ClusterSize:
    nodes = alive_nodes()
    return ClusterSize(*(int(sum(node[name] for node in nodes)) for name in ("CPU", "GPU")))


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, str(default))
    if not text.isdecimal():
        raise ConfigError(f"{variable} is '{text}'", next_step="set it to a whole number, or not at all")
    return int(text)
