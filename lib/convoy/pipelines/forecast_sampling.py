"""`convoy score --dry-run`: score a sample for real, by the same operator through Ray, and throw the scores away."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pyarrow as pa

from convoy.core.progress import Progress
from convoy.core.result_columns import PartitionBy
from convoy.pipelines.committee_predictions import CommitteeJob
from convoy.pipelines.feature_plan import CompileChoice, ExtractionConfig
from convoy.pipelines.forecast import Forecast, Prices, extrapolate
from convoy.pipelines.prediction_request import PredictionRequest
from convoy.pipelines.scoring_plan import scoring_settings
from convoy.storage.manifests import Manifest
from convoy.storage.object_store import ObjectStore

_SAMPLED_SLICES = 4
# Enough to see how batches of a slice overlap, and not more: of a large ensemble each takes a minute. With two batches
# a slice its start and its end weighed so much that 222 images/s were forecast of 364.
_SAMPLED_ROWS = 512
_BATCHES_A_SLICE = 4


def forecast_scoring(
    store: ObjectStore,
    manifest: Manifest,
    request: PredictionRequest,
    *,
    prices: Prices,
    progress: Progress,
    new_run: bool = False,
) -> Forecast:
    """What this scoring would take on the cluster as it is, from rows that are spread evenly over it.

    The sample is computed as the whole would be: with a compiled network if that pays for the whole. Its run is
    deleted afterwards; one that is killed is gone on with by the next dry run of the same, and left behind by one of
    other settings or another version, and with `new_run`.
    """
    started_unix_s = time.time()
    num_images = request.num_rows(manifest)
    batch_size = request.batch_size(store, manifest)
    num_sampled = max(_SAMPLED_ROWS, _SAMPLED_SLICES * _BATCHES_A_SLICE * batch_size)
    rows = _spread_rows(manifest, request, num_images, min(num_sampled, num_images))
    partitions, slice_rows = request.partition_rows(manifest), request.slice_rows(manifest, batch_size)
    settings = scoring_settings(manifest, request, batch_size)
    told = request.extraction.model_copy(
        update={
            "batch_size": batch_size,
            "slice_rows": max(rows.num_rows // (_SAMPLED_SLICES * batch_size), 1) * batch_size,
            "compile": CompileChoice.ALWAYS if settings["compiled"] else CompileChoice.NEVER,
        }
    )
    sample = _sample_request(request, rows, told, planned_rows=num_images)
    job = CommitteeJob(store, manifest, sample)
    found = job.ensure(
        progress=progress,
        config={"forecast_of": request.target(manifest)},
        new_run=new_run or job.is_barred(),
    )
    try:
        slices = found.manifest.slices
        first_row_s = min(
            (one.first_row_unix_s for one in slices if one.first_row_unix_s), default=time.time()
        )
        return extrapolate(
            slices,
            num_images=num_images,
            num_slices=sum(-(-rows // slice_rows) for rows in partitions),
            # The network takes as long for a batch that is not full.
            batches_ratio=sum(-(-rows // batch_size) for rows in partitions) / -(-num_images // batch_size),
            startup_s=max(first_row_s - started_unix_s, 0.0),
            prices=prices,
            notes=[settings["compile_reason"]],
        )
    finally:
        job.discard(found)


def _sample_request(
    request: PredictionRequest, rows: pa.Table, extraction: ExtractionConfig, *, planned_rows: int
) -> PredictionRequest:
    assert request.scores is not None, "only scorings are forecast"
    # Without folders: of so few rows, those of one folder might not fill a batch.
    scores = replace(
        request.scores,
        name=f"forecast of {request.scores.name}",
        forecast=None,
        partition_by=PartitionBy.NONE,
    )
    return replace(request, rows=rows, extraction=extraction, scores=scores, planned_rows=planned_rows)


def _spread_rows(
    manifest: Manifest, request: PredictionRequest, num_images: int, num_sampled: int
) -> pa.Table:
    """Rows at even distances in the order of the manifest."""
    wanted = np.unique(np.linspace(0, num_images - 1, num_sampled).round().astype(np.int64))
    taken, start = [], 0
    for batch in request.batches(manifest):
        table = pa.Table.from_batches([batch]) if isinstance(batch, pa.RecordBatch) else batch
        here = wanted[(wanted >= start) & (wanted < start + table.num_rows)] - start
        if len(here):
            taken.append(table.take(pa.array(here)))
        start += table.num_rows
    return pa.concat_tables(taken)
