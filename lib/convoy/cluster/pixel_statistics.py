"""Moments of the pixels of a dataset: slices of its manifest through Ray Data, one row of sums back for each.

Ray is imported inside the functions: a job that finds nothing to do must not wait for it.
"""

from __future__ import annotations

import pickle
import secrets
from collections.abc import Iterator, Mapping, Sequence

import pyarrow as pa

from convoy.cluster.deadly_slices import DeathWatch
from convoy.cluster.library_versions import library_versions, version_mismatch
from convoy.cluster.ray_data import first_cause, set_up_ray_data
from convoy.cluster.slices import WorkerPool
from convoy.core.errors import ConvoyError
from convoy.vision.decode_rule import DecodeRule
from convoy.vision.pixel_statistics import MeasuredImages

_AFTER_A_DEADLY_SLICE = (
    "most likely one of its images does it: take that out of the dataset, or measure no colours:"
    " write pca_colour.basis into the config"
)


def measure_slices(
    slices: Sequence[pa.Table], decode_rule: DecodeRule, pool: WorkerPool
) -> Iterator[MeasuredImages]:
    """The sums of some slices of a manifest, in the order in which they finish. Needs no GPU.

    Rejected samples are counted and skipped. A worker that dies is replaced, unless a slice ends one after another; an
    error raised in a worker ends the job.
    """
    import ray.data  # noqa: PLC0415
    from ray.exceptions import RayError  # noqa: PLC0415

    set_up_ray_data()
    dataset = ray.data.from_arrow(list(slices)).map_batches(
        _PixelWorker,
        fn_constructor_args=(
            decode_rule.model_dump_json(),
            pool.num_threads,
            secrets.token_hex(8),
            library_versions(),
        ),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(pool.num_workers, len(slices))),
        num_cpus=pool.num_cpus,
    )
    try:
        for row in dataset.iter_rows():
            if row["error"]:
                raise pickle.loads(row["error"])
            yield MeasuredImages.model_validate_json(row["measured"])
    except RayError as error:
        raise first_cause(error) from error


class _PixelWorker:
    """The actor that Ray Data makes for each place in the pool.

    Our own errors come back as rows: of what a worker raises, Ray Data passes on no more than the text.
    """

    def __init__(
        self, decode_rule_json: str, num_threads: int, token: str, versions: Mapping[str, str]
    ) -> None:
        # Only the worker needs torch.
        from convoy.cluster.pixel_meter import PixelMeter  # noqa: PLC0415

        self._mismatch = version_mismatch(versions)
        self._watch = DeathWatch(token, kind="slice", next_step=_AFTER_A_DEADLY_SLICE)
        rule = DecodeRule.model_validate_json(decode_rule_json)
        self._meter = PixelMeter(rule, num_threads=num_threads)

    def __call__(self, rows: pa.Table) -> pa.Table:
        try:
            measured = self._measure(rows)
        except ConvoyError as error:
            return pa.table({"measured": [""], "error": [pickle.dumps(error)]})
        return pa.table({"measured": [measured.model_dump_json()], "error": [b""]})

    def _measure(self, rows: pa.Table) -> MeasuredImages:
        if self._mismatch is not None:
            raise self._mismatch
        with self._watch.watching(f"of the {rows.num_rows} images from {rows['uri'][0].as_py()} on"):
            return self._meter.measure(rows)
