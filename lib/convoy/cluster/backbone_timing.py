"""What running a network costs here: one worker a network, one after the other, and what was measured is kept.

Ray is imported inside the functions: a job that finds everything measured must not wait for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import pyarrow as pa

from convoy.cluster.ray_data import first_cause
from convoy.cluster.slices import WorkerPool
from convoy.core.config import StrictModel
from convoy.core.fingerprints import canonical_json, digest
from convoy.core.machine import MachineFacts
from convoy.storage.documents import read_json
from convoy.storage.object_store import ObjectStore
from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.decode_rule import DecodeRule
from convoy.vision.engine_options import Precision, facts_here
from convoy.vision.presets import EvalPreset

# Raised when the same network on the same machine would be measured in another way.
_VERSION = 1
_FOLDER = "models/costs/"


class TimingSpec(StrictModel):
    """One network, how it is run, and how long it is watched.

    `images_digest` tells the images apart that the whole way is timed on. The numbers of workers and CPUs are those
    wished for: what comes of them is in the result.
    """

    weights_key: str
    weights_digest: str
    backbone: BackboneConfig
    preset: EvalPreset
    decode_rule: DecodeRule
    precision: Precision
    compiled: bool
    batch_size: int
    num_workers: int | None
    cpus_per_worker: int | None
    num_fetch_threads: int
    seconds: float
    num_latencies: int
    images_digest: str


class BackboneTiming(StrictModel):
    """What one worker measured, alone on its part of the machine.

    The rates of the network alone are those of `vision.network_timing.NetworkTiming`. `job_images_per_s` is the
    whole way of the given images, from the store to features, None without images. `peak_memory_bytes` is what
    weights and activations of a batch take, on the GPU where there is one; None where the system does not say.
    """

    images_per_s: float
    slow_images_per_s: float
    fast_images_per_s: float
    latency_p50_ms: float
    latency_p95_ms: float
    job_images_per_s: float | None
    peak_memory_bytes: int | None
    num_threads: int
    machine: MachineFacts
    measured_unix_s: float


def kept_timing(store: ObjectStore, spec: TimingSpec, machine: MachineFacts) -> BackboneTiming | None:
    """What was measured of the same network, in the same way, on such a machine."""
    known = read_json(store, _key(spec, machine))
    return None if known is None else BackboneTiming.model_validate(known)


def keep_timing(store: ObjectStore, spec: TimingSpec, timing: BackboneTiming) -> None:
    """Keep a result in the workspace for the next who asks."""
    store.put(_key(spec, timing.machine), canonical_json(timing))


def machine_of_workers() -> MachineFacts | None:
    """The machine that does the work, where that is known without asking: this one, unless RAY_ADDRESS is set."""
    return None if os.environ.get("RAY_ADDRESS") else facts_here()


def time_backbones(
    workspace: str, specs: Sequence[TimingSpec], images: pa.Table, pool: WorkerPool
) -> Iterator[BackboneTiming]:
    """The result of each spec, in order; a worker that finds it kept for its machine measures nothing.

    Every network gets a process of its own, with the CPUs and threads of one worker of the pool, and a whole GPU where
    there are GPUs. Raises the ConvoyError of a worker.
    """
    import ray  # noqa: PLC0415
    from ray.exceptions import RayError  # noqa: PLC0415

    # One call a process: the memory of one network must not be counted with that of the one before it.
    options = {"num_cpus": pool.num_cpus, "num_gpus": 1 if pool.num_gpus else 0, "max_calls": 1}
    measure = ray.remote(**options)(_measure)
    rows = ray.put(images)
    for spec in specs:
        try:
            result = ray.get(measure.remote(workspace, spec.model_dump_json(), rows, pool.num_threads))
        except RayError as error:
            raise first_cause(error) from error
        yield BackboneTiming.model_validate_json(result)


def _measure(workspace: str, spec_json: str, images: pa.Table, num_threads: int) -> str:
    # Only the worker needs torch.
    from convoy.cluster.backbone_meter import measure_backbone  # noqa: PLC0415

    spec = TimingSpec.model_validate_json(spec_json)
    return measure_backbone(workspace, spec, images, num_threads=num_threads).model_dump_json()


def _key(spec: TimingSpec, machine: MachineFacts) -> str:
    return f"{_FOLDER}{spec.weights_digest}/{digest([_VERSION, spec, machine])}.json"
