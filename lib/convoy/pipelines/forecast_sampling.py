"""`convoy score --dry-run`: score a sample for real, by the same operator through Ray, and throw the scores away."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from convoy.cluster.session import ray_session
from convoy.cluster.slices import PlannedWork, plan_pool
from convoy.core.progress import Progress
from convoy.core.result_columns import PartitionBy
from convoy.pipelines.committee_predictions import BegunRun, CommitteeJob
from convoy.pipelines.feature_plan import CompileChoice, ExtractionConfig
from convoy.pipelines.forecast import Forecast, Prices, extrapolate
from convoy.pipelines.prediction_request import PredictionRequest
from convoy.pipelines.runs_state import SAMPLE_OF
from convoy.pipelines.scoring_plan import scoring_settings
from convoy.storage.manifests import Manifest
from convoy.storage.object_store import ObjectStore

# Two for each worker: the first one says little of the steady state, and all work at once, as they will.
_SLICES_A_WORKER = 2
_LEAST_SLICES = 4
# Enough to see how batches of a slice overlap, and not more: of a large ensemble each takes a minute. With two batches
# a slice its start and its end weighed so much that 222 images/s were forecast of 364.
_BATCHES_A_SLICE = 4
_LEAST_SLICE_ROWS = 128
# On many workers slices are shorter where a dry run would be a good part of the run.
_LARGEST_SHARE = 1 / 4


def forecast_scoring(
    store: ObjectStore,
    manifest: Manifest,
    request: PredictionRequest,
    *,
    prices: Prices,
    progress: Progress,
    begun: BegunRun | None = None,
) -> Forecast:
    """What this scoring would take on the cluster as it is, from blocks of rows that are spread evenly over it.

    Of a run that was `begun` only what is left is forecast, with the settings that it keeps.

    The sample is computed as the whole would be: with a compiled network if that pays for the whole. Its run is
    deleted afterwards; one that was killed is left behind by the next dry run, as slices of two starts do not say when
    either was under way.
    """
    started_unix_s = time.time()
    num_images, partitions = request.num_rows(manifest), request.partition_rows(manifest)
    if begun is None:
        batch_size = request.batch_size(store, manifest)
        settings = scoring_settings(manifest, request, batch_size)
        slice_rows = request.slice_rows(manifest, batch_size)
        rows_left = [rows for whole in partitions for rows in _cut(whole, slice_rows)]
        num_slices = len(rows_left)
    else:
        settings, num_slices = begun.record.settings, begun.record.num_slices
        batch_size = settings["batch_size"]
        rows_left = begun.slice_rows_left
    progress.stage("starting Ray")
    with ray_session():
        planned = request.work(num_images, num_slices)
        num_workers = min(_planned_workers(request.extraction, planned), len(rows_left))
        size = sample_size(sum(rows_left), batch_size, num_workers)
        told = request.extraction.model_copy(
            update={
                "batch_size": batch_size,
                "slice_rows": size.slice_rows,
                "compile": CompileChoice.ALWAYS if settings["compiled"] else CompileChoice.NEVER,
            }
        )
        rows = spread_blocks(request.batches(manifest), num_images, size)
        job = CommitteeJob(store, manifest, _sample_request(request, rows, told, planned))
        found = job.ensure(
            progress=progress,
            config={SAMPLE_OF: request.target(manifest)},
            new_run=True,
        )
    try:
        slices = found.manifest.slices
        first_row_s = min(
            (one.first_row_unix_s for one in slices if one.first_row_unix_s), default=time.time()
        )
        return extrapolate(
            slices,
            slice_rows=rows_left,
            num_workers=num_workers,
            # The network takes as long for a batch that is not full.
            batches_ratio=sum(-(-rows // batch_size) for rows in partitions) / -(-num_images // batch_size),
            startup_s=max(first_row_s - started_unix_s, 0.0),
            prices=prices,
            notes=[settings["compile_reason"]],
        )
    finally:
        job.discard(found)


def _cut(num_rows: int, slice_rows: int) -> list[int]:
    """The rows of the slices that a partition is cut into."""
    rest = [num_rows % slice_rows] if num_rows % slice_rows else []
    return [slice_rows] * (num_rows // slice_rows) + rest


class SampleSize(NamedTuple):
    """How many slices a sample has, and the rows of each."""

    num_slices: int
    slice_rows: int


def sample_size(num_images: int, batch_size: int, num_workers: int) -> SampleSize:
    """Slices for so many workers, as far as there are images: whole batches, and a small part of all images."""
    wanted_rows = max(_BATCHES_A_SLICE * batch_size, _LEAST_SLICE_ROWS)
    num_slices = max(_SLICES_A_WORKER * num_workers, _LEAST_SLICES)
    most_rows = max(int(_LARGEST_SHARE * num_images), _LEAST_SLICES * wanted_rows)
    num_rows = min(num_slices * wanted_rows, most_rows, num_images)
    slice_rows = max(num_rows // (num_slices * batch_size), 1) * batch_size
    return SampleSize(max(min(num_slices, num_images // slice_rows), 1), slice_rows)


def _planned_workers(extraction: ExtractionConfig, planned: PlannedWork) -> int:
    """How many the cluster has for the whole."""
    return plan_pool(extraction.num_workers, extraction.cpus_per_worker, planned).num_workers


def _sample_request(
    request: PredictionRequest, rows: pa.Table, extraction: ExtractionConfig, planned: PlannedWork
) -> PredictionRequest:
    assert request.scores is not None, "only scorings are forecast"
    # Without folders: of so few rows, those of one folder might not fill a batch.
    scores = replace(
        request.scores,
        name=f"forecast of {request.scores.name}",
        forecast=None,
        partition_by=PartitionBy.NONE,
    )
    return replace(request, rows=rows, extraction=extraction, scores=scores, planned=planned)


def spread_blocks(
    batches: Iterable[pa.Table | pa.RecordBatch], num_images: int, size: SampleSize
) -> pa.Table:
    """For each slice a block of consecutive rows, at even distances in the order of the manifest.

    Neighbours often lie in one row group of a parquet file, which is read once for all of them, as in the whole run.
    """
    block_rows = min(size.slice_rows, num_images)
    starts = np.arange(size.num_slices) * (num_images - block_rows) // max(size.num_slices - 1, 1)
    wanted = (starts[:, None] + np.arange(block_rows)).reshape(-1)
    taken, start = [], 0
    for batch in batches:
        table = pa.Table.from_batches([batch]) if isinstance(batch, pa.RecordBatch) else batch
        here = wanted[(wanted >= start) & (wanted < start + table.num_rows)] - start
        if len(here):
            taken.append(table.take(pa.array(here)))
        start += table.num_rows
    return pa.concat_tables(taken)
