"""Predictions of slices by a committee, by fused operators that Ray Data runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from convoy.cluster.scoring_spec import ScoringSpec
from convoy.cluster.slices import SliceOperator, SliceTask, WorkerPool, run_slices
from convoy.storage.commits import SliceRecord


def score_slices(spec: ScoringSpec, tasks: Sequence[SliceTask], pool: WorkerPool) -> Iterator[SliceRecord]:
    """The records of the tasks' slices, in the order in which they finish; see `run_slices`."""
    return run_slices(_scorer, spec, tasks, pool, verb="evaluate" if spec.table is None else "score")


def _scorer(spec_json: str) -> SliceOperator:
    from convoy.cluster.scoring import Scorer  # noqa: PLC0415

    return Scorer(ScoringSpec.model_validate_json(spec_json))
