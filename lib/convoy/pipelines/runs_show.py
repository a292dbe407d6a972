"""`convoy runs show`: what a run is and how far it is, from storage alone, so that anybody may look from anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from convoy.core.config import StrictModel
from convoy.core.errors import DataError
from convoy.pipelines.feature_summary import seconds_under_way, slice_totals, timings
from convoy.pipelines.runs_list import ListedRun, finished_slices, listed_run
from convoy.pipelines.runs_state import RunState, existing_run
from convoy.storage.commits import SliceRecord
from convoy.storage.documents import read_json
from convoy.storage.object_store import ObjectStore
from convoy.storage.runs import RunFolder, RunRecord, open_pointers


class RunDescription(ListedRun):
    """A run in full.

    `images_per_s` is over the time in which slices were under way; of a run that is held, `left_s` is how long the
    rest takes at that rate. `seconds` are the stages, summed over workers. `forecast` is what a dry run said and
    `actual` what became of it.
    """

    uri: str
    slices: int
    slices_done: int
    results: int
    rejects: int
    reject_codes: dict[str, int]
    flags: dict[str, int]
    images_per_s: float | None
    left_s: float | None
    seconds: dict[str, float]
    outputs: dict[str, str]
    identity: dict[str, Any]
    config: dict[str, Any]
    settings: dict[str, Any]
    versions: dict[str, str]
    forecast: dict[str, Any] | None
    actual: dict[str, Any] | None


class _Progress(StrictModel):
    slices_done: int
    results: int
    rejects: int
    images_per_s: float | None


def show_run(store: ObjectStore, run_id: str) -> RunDescription:
    """What one run is. ConfigError if there is none, DataError if it died before anything was recorded of it."""
    pointers = open_pointers(store)
    folder = existing_run(store, run_id, pointers)
    record = folder.record()
    if record is None:
        raise DataError(
            "the run died before its input was frozen: there is no more to say of it",
            where=folder.prefix,
            next_step=f"run the job's command again, or give it up: convoy runs cancel {run_id}",
        )
    listed = listed_run(store, run_id, pointers)
    return _described(folder, record, listed, finished_slices(folder))


def _described(
    folder: RunFolder, record: RunRecord, listed: ListedRun, slices: Sequence[SliceRecord]
) -> RunDescription:
    progress = _progress(slices)
    totals = slice_totals(slices)
    report = read_json(folder.store, folder.key("report.json")) or {}
    return RunDescription(
        **listed.model_dump(),
        **progress.model_dump(),
        uri=folder.store.uri(folder.prefix),
        slices=record.num_slices,
        reject_codes=totals["reject_codes"],
        flags=totals["flags"],
        left_s=_left_s(record, listed, progress),
        seconds=timings(slices, 0.0)["seconds"],
        outputs={output: folder.store.uri(prefix) for output, prefix in record.outputs.items()},
        identity=record.identity,
        config=record.config,
        settings=record.settings,
        versions=record.versions,
        forecast=report.get("forecast") or record.settings.get("forecast"),
        actual=report.get("actual"),
    )


def _progress(slices: Sequence[SliceRecord]) -> _Progress:
    results, rejects = (sum(getattr(one, name) for one in slices) for name in ("num_results", "num_rejects"))
    busy_s = seconds_under_way(slices)
    return _Progress(
        slices_done=len(slices),
        results=results,
        rejects=rejects,
        images_per_s=(results + rejects) / busy_s if busy_s else None,
    )


def _left_s(record: RunRecord, listed: ListedRun, progress: _Progress) -> float | None:
    if listed.state is not RunState.HELD or not progress.images_per_s:
        return None
    return (record.num_inputs - progress.results - progress.rejects) / progress.images_per_s
