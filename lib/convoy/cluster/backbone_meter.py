"""Inside the worker: a network from the workspace, timed alone and on real images."""

from __future__ import annotations

import time
from collections.abc import Mapping

import pyarrow as pa
from torch import Tensor

from convoy.cluster.kept_weights import open_network
from convoy.cluster.prepared_batches import ImagePreparer, SliceImages
from convoy.cluster.slices import WorkerPool
from convoy.cluster.stall_watch import StallWatch
from convoy.cluster.timing_spec import BackboneTiming, TimingSpec, keep_timing, kept_timing
from convoy.core.processes import keep_freed_memory
from convoy.storage.object_store import ObjectStore
from convoy.storage.stores import open_store
from convoy.vision.augmentation_policy import EVAL_VIEW
from convoy.vision.engine import FeatureEngine
from convoy.vision.engine_options import EngineOptions, facts_here
from convoy.vision.forward import best_device, casting_once
from convoy.vision.network_timing import MemoryMeter, time_network
from convoy.vision.views import prepare_view

# The way through the pipeline is timed from its start; so many batches make its filling not matter.
_FEWEST_BATCHES = 8


def measure_backbone(workspace: str, spec: TimingSpec, images: pa.Table, pool: WorkerPool) -> BackboneTiming:
    """Measure the network of a spec as a worker of the pool, and keep it.

    What is kept for a machine like this, and as many threads, is not measured again. `images` are rows of a
    manifest, which come again where they are few; without rows only the network is timed.
    """
    store, machine = open_store(workspace), facts_here()
    kept = kept_timing(store, spec, machine)
    if kept is not None and kept.num_threads == pool.num_threads:
        # The cluster may have another size by now.
        return kept.model_copy(update={"num_workers": pool.num_workers, "gpu_share": pool.num_gpus})
    # As the workers of jobs do.
    keep_freed_memory()
    memory = MemoryMeter(best_device())
    engine = _open_engine(store, spec, pool.num_threads)
    engine.warm_up()
    network = time_network(engine, seconds=spec.seconds, num_latencies=spec.num_latencies)
    timing = BackboneTiming(
        **network.model_dump(),
        job_images_per_s=_job_images_per_s(engine, spec, images, pool) if images.num_rows else None,
        peak_memory_bytes=memory.peak_bytes(),
        num_threads=pool.num_threads,
        num_workers=pool.num_workers,
        gpu_share=pool.num_gpus,
        machine=machine,
        measured_unix_s=time.time(),
    )
    keep_timing(store, spec, timing)
    return timing


def _open_engine(store: ObjectStore, spec: TimingSpec, num_threads: int) -> FeatureEngine:
    """The whole network with its weights."""
    network, axis = open_network(store, spec.backbone, spec.weights_key, None)
    options = EngineOptions(
        precision=spec.precision,
        batch_size=spec.batch_size,
        compiled=spec.compiled,
        num_threads=num_threads,
    )
    return FeatureEngine(network, axis, spec.preset, taps=(axis[len(axis) - 1].name,), options=options)


def _job_images_per_s(
    engine: FeatureEngine, spec: TimingSpec, images: pa.Table, pool: WorkerPool
) -> float | None:
    """Images a second from the store to features, as the operator of a cache job does it but for the writing."""

    def fill(pixels_CHW: Tensor, content_id: bytes, places: Mapping[int, Tensor]) -> None:
        for image_CHW in places.values():
            prepare_view(
                pixels_CHW, spec.preset, image_CHW, view=EVAL_VIEW, policy=None, content_id=content_id
            )

    watch = StallWatch()
    preparer: ImagePreparer[int] = ImagePreparer(
        spec.decode_rule,
        num_fetch_threads=spec.num_fetch_threads,
        num_decode_threads=pool.num_decode_threads,
        fill=fill,
        watch=watch,
    )
    repeats = -(-_FEWEST_BATCHES * spec.batch_size // images.num_rows)
    rows = SliceImages(pa.concat_tables([images] * repeats).combine_chunks(), time.time())
    num_images, started_s = 0, time.perf_counter()
    batches = preparer.batches(rows, lambda: {EVAL_VIEW: engine.new_batch()}, spec.batch_size)
    with watch.watching(), casting_once(engine.device):
        for batch in batches:
            for features_BD in engine.run(batch.images[EVAL_VIEW]).values():
                features_BD.cpu()
            num_images += len(batch.rows)
            is_long = time.perf_counter() > started_s + spec.seconds
            if is_long and num_images >= _FEWEST_BATCHES * spec.batch_size:
                break
    return num_images / (time.perf_counter() - started_s)
