"""Pictures of a network, by operators that Ray Data runs: a piece is a slice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from convoy.cluster.inspection_spec import InspectionSpec
from convoy.cluster.slices import SliceOperator, SliceTask, WorkerPool, run_slices
from convoy.storage.commits import SliceRecord


def inspect_slices(
    spec: InspectionSpec, tasks: Sequence[SliceTask], pool: WorkerPool
) -> Iterator[SliceRecord]:
    """The records of the tasks' pieces, in the order in which they finish; see `run_slices`."""
    return run_slices(_inspector, spec, tasks, pool, verb="inspect")


def _inspector(spec_json: str) -> SliceOperator:
    from convoy.cluster.inspection import Inspector  # noqa: PLC0415

    return Inspector(InspectionSpec.model_validate_json(spec_json))
