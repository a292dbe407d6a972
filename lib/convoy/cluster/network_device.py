"""What the networks of a job run on: a device of this machine, or of a cluster's machines, of which one is asked.

Ray is imported inside the functions: a job that finds nothing to do must not wait for it.
"""

from __future__ import annotations

import os
import sys

from convoy.cluster.growth import regrow_cluster
from convoy.cluster.nodes import alive_nodes, worker_nodes
from convoy.cluster.ray_data import first_cause
from convoy.cluster.session import ray_session
from convoy.vision.engine_options import NetworkDevice, Precision, device_here

# A fresh machine may take a minute to start a process and to import torch.
_TIMEOUT_S = 120.0
# So little of a GPU, or of a CPU, is nearly always free.
_SHARE = 0.01
_TYPE = "accelerator_type:"
# GPUs, as Ray names them, that are older than bf16.
_WITHOUT_BF16 = frozenset({"K80", "P4", "P100", "T4", "V100"})


def known_device() -> NetworkDevice | None:
    """That of this machine, or None where a cluster does the work, and would have to be asked."""
    return None if _is_elsewhere() else device_here()


def find_device() -> NetworkDevice:
    """The same, or of a cluster what a worker says: one with a GPU if there is any.

    Where none answers in two minutes, it is what can be told without.
    """
    if not _is_elsewhere():
        return device_here()
    with ray_session():
        regrow_cluster()
        return _ask()


def _is_elsewhere() -> bool:
    if os.environ.get("RAY_ADDRESS"):
        return True
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized() and len(alive_nodes()) > 1


def _ask() -> NetworkDevice:
    import ray  # noqa: PLC0415
    from ray.exceptions import GetTimeoutError, RayError  # noqa: PLC0415

    nodes = alive_nodes()
    has_gpus = any(node["GPU"] for node in worker_nodes(nodes))
    share = {"num_cpus": 0, "num_gpus": _SHARE} if has_gpus else {"num_cpus": _SHARE}
    # One call a process, so that what torch takes of a GPU is given back; and not within the reservation of a trial,
    # which has none.
    answer = ray.remote(max_calls=1, scheduling_strategy="DEFAULT", **share)(device_here).remote()
    try:
        device: NetworkDevice = ray.get(answer, timeout=_TIMEOUT_S)
    except GetTimeoutError:
        ray.cancel(answer)
        types = [name.removeprefix(_TYPE) for name in ray.cluster_resources() if name.startswith(_TYPE)]
        return supposed_gpu(types) if has_gpus else _supposed_cpu()
    except RayError as error:
        raise first_cause(error) from error
    # Of a container the system tells the CPUs of its host.
    return device.model_copy(update={"num_cpus": max(int(max(node["CPU"] for node in nodes)), 1)})


def supposed_gpu(types: list[str]) -> NetworkDevice:
    """A GPU of a cluster that has these types, by Ray's names, where none was free to be asked."""
    has_bf16 = _WITHOUT_BF16.isdisjoint(types)
    return NetworkDevice(
        name=f"a GPU of the cluster ({', '.join(sorted(types)) or 'unknown'}; none was free to be asked)",
        is_gpu=True,
        precision=Precision.BF16 if has_bf16 else Precision.FP32,
        has_compiler=None,
    )


def _supposed_cpu() -> NetworkDevice:
    here = device_here()
    name = f"{here.name} of the driver (no other was free to be asked)"
    return here.model_copy(update={"name": name, "has_compiler": None})
