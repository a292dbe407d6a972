"""What running a network costs here: one worker a network, one after the other.

Ray is imported inside the functions: a job that finds everything measured must not wait for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import pyarrow as pa

from convoy.cluster.ray_data import first_cause
from convoy.cluster.slices import WorkerPool
from convoy.cluster.timing_spec import BackboneTiming, TimingSpec
from convoy.core.machine import MachineFacts
from convoy.vision.engine_options import facts_here


def machine_of_workers() -> MachineFacts | None:
    """The machine that does the work, where that is known without asking: this one, unless RAY_ADDRESS is set."""
    return None if os.environ.get("RAY_ADDRESS") else facts_here()


def time_backbones(
    workspace: str, asked: Sequence[tuple[TimingSpec, WorkerPool]], images: pa.Table
) -> Iterator[BackboneTiming]:
    """The result of each spec, in order; a worker that finds it kept for its machine and threads measures nothing.

    Every network gets a process of its own, with the CPUs and threads of one worker of its pool, and a whole GPU where
    there are GPUs. Raises the ConvoyError of a worker.
    """
    import ray  # noqa: PLC0415
    from ray.exceptions import RayError  # noqa: PLC0415

    rows = ray.put(images)
    for spec, pool in asked:
        # One call a process: the memory of one network must not be counted with that of the one before it.
        options = {"num_cpus": pool.num_cpus, "num_gpus": 1 if pool.num_gpus else 0, "max_calls": 1}
        measure = ray.remote(**options)(_measure)
        try:
            result = ray.get(measure.remote(workspace, spec.model_dump_json(), rows, pool.model_dump_json()))
        except RayError as error:
            raise first_cause(error) from error
        yield BackboneTiming.model_validate_json(result)


def _measure(workspace: str, spec_json: str, images: pa.Table, pool_json: str) -> str:
    # Only the worker needs torch.
    from convoy.cluster.backbone_meter import measure_backbone  # noqa: PLC0415

    spec = TimingSpec.model_validate_json(spec_json)
    pool = WorkerPool.model_validate_json(pool_json)
    return measure_backbone(workspace, spec, images, pool).model_dump_json()
