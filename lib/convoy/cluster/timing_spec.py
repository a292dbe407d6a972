"""What is asked of a network that is timed, what comes of it, and where that is kept."""

from __future__ import annotations

from convoy.core.config import StrictModel
from convoy.core.fingerprints import canonical_json, digest
from convoy.core.machine import MachineFacts
from convoy.storage.documents import read_model
from convoy.storage.object_store import ObjectStore
from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.decode_rule import DecodeRule
from convoy.vision.engine_options import Precision
from convoy.vision.presets import EvalPreset

# Raised when the same network on the same machine would be measured in another way.
_VERSION = 3
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
    num_fetch_threads: int | None
    seconds: float
    num_latencies: int
    images_digest: str


class BackboneTiming(StrictModel):
    """What one worker measured, alone on its part of the machine.

    The rates of the network alone are those of `vision.network_timing.NetworkTiming`. `job_images_per_s` is the
    whole way of the given images, from the store to features, None without images. `peak_memory_bytes` is what
    weights and activations of a batch take, on the GPU where there is one; None where the system does not say.
    It was one of `num_workers` of the cluster, each of which has `gpu_share` of a GPU, 0 where there is none, though
    the network had a whole one here.
    """

    images_per_s: float
    slow_images_per_s: float
    fast_images_per_s: float
    latency_p50_ms: float
    latency_p95_ms: float
    job_images_per_s: float | None
    peak_memory_bytes: int | None
    num_threads: int
    num_workers: int
    gpu_share: float
    machine: MachineFacts
    measured_unix_s: float

    @property
    def cluster_images_per_s(self) -> float:
        """The rate of all workers together: workers that share a GPU are no faster than it is."""
        if not self.gpu_share:
            return (self.job_images_per_s or self.images_per_s) * self.num_workers
        of_gpus = self.images_per_s * self.num_workers * self.gpu_share
        return min(of_gpus, (self.job_images_per_s or self.images_per_s) * self.num_workers)


def kept_timing(store: ObjectStore, spec: TimingSpec, machine: MachineFacts) -> BackboneTiming | None:
    """What was measured of the same network, in the same way, on such a machine."""
    return read_model(BackboneTiming, store, _key(spec, machine))


def keep_timing(store: ObjectStore, spec: TimingSpec, timing: BackboneTiming) -> None:
    """Keep a result in the workspace for the next who asks."""
    store.put(_key(spec, timing.machine), canonical_json(timing))


def _key(spec: TimingSpec, machine: MachineFacts) -> str:
    return f"{_FOLDER}{spec.weights_digest}/{digest([_VERSION, spec, machine])}.json"
