"""A Ray session: the cluster named by RAY_ADDRESS, or a local one that lives as long as the job."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from convoy.cluster.growth import grow_cluster, wanted_size
from convoy.core.errors import ConfigError

# Only keys and records flow through the object store, so a local session needs little of it.
_LOCAL_OBJECT_STORE_BYTES = 256 * 2**20


@contextmanager
def ray_session() -> Iterator[None]:
    """Connect to Ray and leave it as it was found.

    With RAY_ADDRESS set, that cluster is used, as soon as it has what CONVOY_CLUSTER_CPUS and CONVOY_CLUSTER_GPUS ask
    for. Without, a local Ray without a dashboard is started and stopped. A session that is already open in this
    process (a test, a notebook) is used as it is. Raises ConfigError for an address of a dashboard.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A thread that still asks for Ray when the session has ended must not join whatever cluster it finds.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    # Imported here, because a job that finds nothing to do must not wait for Ray.
    import ray  # noqa: PLC0415

    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    if address and address.startswith(("http://", "https://")):
        raise ConfigError(
            f"RAY_ADDRESS is {address}, where a dashboard takes jobs, not where Ray takes a driver",
            next_step="send the job there with `convoy submit`, or unset RAY_ADDRESS to run it here",
        )
    local = {} if address else {"include_dashboard": False, "object_store_memory": _LOCAL_OBJECT_STORE_BYTES}
    on_sigterm = signal.getsignal(signal.SIGTERM)
    if not address:
        # Threads of an OpenMP team that wait must not hold the cores that decoders need, but to wake them costs more
        # than a short wait: this is a tenth of a millisecond. Workers take it from the process that starts Ray.
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # Without "local" Ray would join the last cluster that `ray start` left behind on this machine.
    ray.init(address=address or "local", logging_level=logging.ERROR, log_to_driver=False, **local)
    if threading.current_thread() is threading.main_thread():
        # Ray puts a handler of its own there, which aborts the process.
        signal.signal(signal.SIGTERM, on_sigterm)
    try:
        if address:
            grow_cluster(wanted_size())
        yield
    finally:
        ray.shutdown()
