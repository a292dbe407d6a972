"""What backbones cost on the user's own images and machine: measured once, and kept in the workspace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from convoy.cluster.backbone_timing import machine_of_workers, time_backbones
from convoy.cluster.network_device import find_device
from convoy.cluster.session import ray_session
from convoy.cluster.slices import PlannedWork, WorkerPool, plan_pool
from convoy.cluster.timing_spec import BackboneTiming, TimingSpec, kept_timing
from convoy.core.config import StrictModel
from convoy.core.fingerprints import digest
from convoy.core.machine import MachineFacts
from convoy.core.progress import Progress
from convoy.pipelines.backbone_record import BackboneRecord
from convoy.pipelines.feature_plan import CompileChoice, ExtractionConfig, compile_decision, forward_s
from convoy.pipelines.pixel_statistics import choose_rows
from convoy.storage.manifests import Manifest
from convoy.storage.object_store import ObjectStore
from convoy.vision.engine_options import NetworkDevice, Precision

_MILLION = 1_000_000


class CostsConfig(StrictModel):
    """How the cost of a backbone is measured.

    Batches for `seconds`, then up to `latencies` single images for as long at most, then `images` of the train split
    on their whole way from the store; 0 leaves that out. Without `batch_size` batches are those of the extraction.
    `compile: auto` compiles what would be compiled for a million images. `price_per_hour` is what the whole cluster
    costs an hour, in any currency.
    """

    batch_size: PositiveInt | None = None
    seconds: PositiveFloat = 2.0
    latencies: PositiveInt = 100
    images: NonNegativeInt = 256
    compile: CompileChoice = CompileChoice.NEVER
    price_per_hour: PositiveFloat | None = None


class BackboneCost(StrictModel):
    """One backbone, as one worker of the cluster met it.

    `images_per_s` is that of all workers together, for the whole way from the image in the store to the answer where
    images were given, else for the network alone: that of the worker times their number, at most what their GPUs
    compute. `from_store` tells which of the two, null in reports of versions that did not. `network_images_per_s` is of
    one GPU or worker, for the median batch; the slow and fast rates are those of the batches at the 90th and 10th
    percentile of time. `macs` are multiply-adds of an image, `size_bytes` those of the weights as they are stored,
    `peak_memory_bytes` what weights and activations of a batch take. `usd_per_million` is the money for a million
    images by the price in the config.
    """

    arch: str
    weights_digest: str
    input_px: int
    num_parameters: int
    size_bytes: int
    macs: int
    images_per_s: float
    from_store: bool | None = None
    network_images_per_s: float
    slow_network_images_per_s: float
    fast_network_images_per_s: float
    latency_p50_ms: float
    latency_p95_ms: float
    peak_memory_bytes: int | None
    usd_per_million: float | None
    precision: Precision
    batch_size: int
    compiled: bool
    num_threads: int
    machine: MachineFacts
    measured_unix_s: float = Field(ge=0)


def measure_costs(
    store: ObjectStore,
    manifest: Manifest,
    backbones: Sequence[BackboneRecord],
    config: CostsConfig,
    extraction: ExtractionConfig,
    *,
    progress: Progress,
) -> list[BackboneCost]:
    """The cost of each backbone, in their order, as one worker of a job of a million images meets it.

    The precision of `extraction` is one that was settled.

    What was measured for the same weights, preset, precision, images and settings on such a machine is not measured
    again. Nothing else should run on the machine meanwhile: the rates are those of what is left.
    """
    images = choose_rows(manifest, config.images)
    images_digest = digest(images["content_id"].to_pylist())
    # A cluster is asked once for all of them.
    find = cache(find_device)
    specs = [_spec(backbone, config, extraction, images_digest, find) for backbone in backbones]
    here = machine_of_workers()
    known = [None if here is None else kept_timing(store, spec, here) for spec in specs]
    lacking = [
        (backbone, spec)
        for backbone, spec, timing in zip(backbones, specs, known, strict=True)
        if timing is None
    ]
    measured: list[BackboneTiming] = []
    if lacking:
        with ray_session():
            asked = [(spec, _pool(backbone, extraction)) for backbone, spec in lacking]
            progress.stage(f"measuring the cost of {len(lacking)} backbones")
            for timing in time_backbones(store.root_uri, asked, images):
                measured.append(timing)
                progress.stage(f"measured the cost of {len(measured)} of {len(lacking)} backbones")
    new = iter(measured)
    timings = [timing or next(new) for timing in known]
    return [
        _cost(store, backbone, spec, timing, config)
        for backbone, spec, timing in zip(backbones, specs, timings, strict=True)
    ]


def _pool(backbone: BackboneRecord, extraction: ExtractionConfig) -> WorkerPool:
    """The workers of a large job: without work to share out, the pool would be one of few large ones."""
    work = PlannedWork(_MILLION, backbone.weights_bytes)
    return plan_pool(extraction.num_workers, extraction.cpus_per_worker, work)


def _spec(
    backbone: BackboneRecord,
    config: CostsConfig,
    extraction: ExtractionConfig,
    images_digest: str,
    find: Callable[[], NetworkDevice],
) -> TimingSpec:
    compiled, _ = compile_decision(config.compile, forward_s(_MILLION * backbone.macs), find)
    batch_size = config.batch_size or extraction.batch_size or find().batch_size(backbone.preset.crop_px)
    return TimingSpec(
        weights_key=backbone.weights_key,
        weights_digest=backbone.weights_digest,
        backbone=backbone.config,
        preset=backbone.preset,
        decode_rule=extraction.decode,
        precision=Precision(extraction.precision.value),
        compiled=compiled,
        batch_size=batch_size,
        num_workers=extraction.num_workers,
        cpus_per_worker=extraction.cpus_per_worker,
        num_fetch_threads=extraction.num_fetch_threads,
        seconds=config.seconds,
        num_latencies=config.latencies,
        images_digest=images_digest,
    )


def _cost(
    store: ObjectStore,
    backbone: BackboneRecord,
    spec: TimingSpec,
    timing: BackboneTiming,
    config: CostsConfig,
) -> BackboneCost:
    images_per_s = timing.cluster_images_per_s
    hours = _MILLION / images_per_s / 3600
    return BackboneCost(
        arch=backbone.arch,
        weights_digest=backbone.weights_digest,
        input_px=backbone.preset.crop_px,
        num_parameters=backbone.num_parameters,
        size_bytes=store.head(backbone.weights_key).size_bytes,
        macs=backbone.macs,
        images_per_s=images_per_s,
        from_store=timing.job_images_per_s is not None,
        network_images_per_s=timing.images_per_s,
        slow_network_images_per_s=timing.slow_images_per_s,
        fast_network_images_per_s=timing.fast_images_per_s,
        latency_p50_ms=timing.latency_p50_ms,
        latency_p95_ms=timing.latency_p95_ms,
        peak_memory_bytes=timing.peak_memory_bytes,
        usd_per_million=None if config.price_per_hour is None else hours * config.price_per_hour,
        precision=spec.precision,
        batch_size=spec.batch_size,
        compiled=spec.compiled,
        num_threads=timing.num_threads,
        machine=timing.machine,
        measured_unix_s=timing.measured_unix_s,
    )
