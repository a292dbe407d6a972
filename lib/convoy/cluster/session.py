"""A Ray session: the cluster named by RAY_ADDRESS, or a local one that lives as long as the job."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from convoy.cluster.growth import grow_cluster, wanted_size
from convoy.cluster.head_watch import watching_head
from convoy.core.errors import ClusterError, ConfigError

# What workers must find when they start. Threads of an OpenMP team that wait must not hold the cores of decoders, but
# to wake them costs more than a short wait: this is a tenth of a millisecond. And glibc keeps large blocks in the first
# of its pools only, see `keep_freed_memory`: with Ray's many threads, that of a network would get another one.
WORKER_ENVIRONMENT = {"GOMP_SPINCOUNT": "10000", "MALLOC_ARENA_MAX": "1"}
# Without GPUs only keys and records flow through the object store, so a local session needs little of it.
_SMALL_OBJECT_STORE_BYTES = 256 * 2**20
_SHARED_MEMORY = "/dev/shm"
# From here on Ray's own size, three tenths of the memory, never exceeds the shared memory that it finds.
_AMPLE_SHARED_MEMORY_BYTES = 12 * 2**30


@contextmanager
def ray_session() -> Iterator[None]:
    """Connect to Ray and leave it as it was found.

    With RAY_ADDRESS set, that cluster is used, as soon as it has what CONVOY_CLUSTER_CPUS and CONVOY_CLUSTER_GPUS ask
    for. Without, a local Ray without a dashboard is started and stopped. A session that is already open in this
    process (a test, a notebook) is used as it is. Raises ConfigError for an address of a dashboard, ClusterError where
    no Ray answers or starts; a head that is gone later stops the job as resumable.
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
    on_sigterm = signal.getsignal(signal.SIGTERM)
    if address:
        _join(address)
    else:
        # Workers take it from the process that starts Ray.
        for name, value in WORKER_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        _start()
    if threading.current_thread() is threading.main_thread():
        # Ray puts a handler of its own there, which aborts the process.
        signal.signal(signal.SIGTERM, on_sigterm)
    # Over the shutdown too, which may wait for a head that is gone.
    with watching_head(ray.get_runtime_context().gcs_address):
        try:
            if address:
                grow_cluster(wanted_size())
            yield
        finally:
            ray.shutdown()


def _start() -> None:
    try:
        # Without "local" Ray would join the last cluster that `ray start` left behind on this machine.
        _init("local", include_dashboard=False, object_store_memory=_object_store_bytes())
    # Ray raises no narrower one where its processes take longer than half a minute, as on a machine that is too busy.
    except Exception as error:
        raise ClusterError(
            f"Ray did not start here: {error}",
            next_step="run the same command again when the machine is less busy; Ray's logs are below /tmp/ray",
        ) from error


def _join(address: str) -> None:
    from ray.exceptions import AuthenticationError  # noqa: PLC0415

    try:
        _init(address)
    # A ValueError says that this is no address.
    except (ConnectionError, ValueError, AuthenticationError) as error:
        raise ClusterError(
            f"no Ray answers, or takes this driver: {error}",
            where=f"RAY_ADDRESS={address}",
            next_step="unset RAY_ADDRESS to run the job here, or check address and token, and that the cluster runs",
        ) from error


def _init(address: str, **settings: Any) -> None:
    import ray  # noqa: PLC0415

    ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, **settings)


def _object_store_bytes() -> int | None:
    """The object store of a local session: beside GPUs, whose batches go through it, Ray's own (None) or what fits."""
    if not _num_gpus():
        return _SMALL_OBJECT_STORE_BYTES
    try:
        free_bytes = shutil.disk_usage(_SHARED_MEMORY).free
    except OSError:
        return _SMALL_OBJECT_STORE_BYTES
    if free_bytes >= _AMPLE_SHARED_MEMORY_BYTES:
        return None
    # A container has 64 MB unless it is given more. What does not fit there, Ray would put on the disk.
    return max(_SMALL_OBJECT_STORE_BYTES, int(0.9 * free_bytes))


def _num_gpus() -> int:
    """The GPUs that Ray will find on this machine."""
    from ray._private.accelerators import get_accelerator_manager_for_resource  # noqa: PLC0415

    return int(get_accelerator_manager_for_resource("GPU").get_current_node_num_accelerators())
