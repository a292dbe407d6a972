"""Features of slices, by fused operators that Ray Data runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from convoy.cluster.extraction_spec import ExtractionSpec
from convoy.cluster.slices import SliceOperator, SliceTask, WorkerPool, run_slices
from convoy.storage.commits import SliceRecord


def extract_slices(
    spec: ExtractionSpec, tasks: Sequence[SliceTask], pool: WorkerPool
) -> Iterator[SliceRecord]:
    """The records of the tasks' slices, in the order in which they finish; see `run_slices`."""
    return run_slices(_extractor, spec, tasks, pool, verb="cache")


def _extractor(spec_json: str) -> SliceOperator:
    from convoy.cluster.extraction import FeatureExtractor  # noqa: PLC0415

    return FeatureExtractor(ExtractionSpec.model_validate_json(spec_json))
