"""The slices of a run that are still to do, and how they are done: what every job on slices shares."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

from convoy.cluster.session import ray_session
from convoy.cluster.slices import PlannedWork, SliceTask, WorkerPool, plan_pool
from convoy.core.crash_points import CrashPoint, crash_point
from convoy.core.progress import Progress
from convoy.pipelines.feature_plan import ExtractionConfig
from convoy.storage.commits import SliceRecord, choose_attempts, read_manifest, read_records
from convoy.storage.leases import RunLease
from convoy.storage.runs import RunFolder, RunRecord

_log = logging.getLogger(__name__)
# The input is cut by them, or numbers depend on them.
_SETTLED_AT_THE_START = ("batch_size", "slice_rows", "compile")
# Starts the operators of a pool on some slices; their records come as they are done.
SliceRunner = Callable[[Sequence[SliceTask], WorkerPool], Iterator[SliceRecord]]


def done_slices(folder: RunFolder, record: RunRecord) -> dict[str, SliceRecord]:
    """The slices of a run that need not be computed again, by name: all of a run that was published."""
    manifest = read_manifest(folder)
    if manifest is not None:
        return {one.slice: one for one in manifest.slices}
    return choose_attempts(folder, record, read_records(folder))


def do_slices(
    folder: RunFolder,
    record: RunRecord,
    run: SliceRunner,
    *,
    lease: RunLease,
    extraction: ExtractionConfig,
    progress: Progress,
    work: PlannedWork,
) -> list[SliceRecord]:
    """Run the slices that have no verified attempt, largest first; returns the records of those that were done now.

    `work` is that of the whole run, whatever is left: the number of threads moves the last bits of what is computed.

    The lease is confirmed at the end: what follows is publishing. Raises LeaseLost or RunCancelled between slices, as
    soon as the run is not this driver's any more.
    """
    _warn_of_kept_settings(record, extraction)
    done = done_slices(folder, record)
    tasks = [
        SliceTask(slice=name, outputs=record.outputs_of(name))
        for name in record.slice_names_by_size()
        if name not in done
    ]
    if not tasks:
        lease.confirm()
        return []
    finished = []
    progress.stage("starting Ray and the workers")
    with ray_session():
        num_done = sum(slice_.num_results + slice_.num_rejects for slice_ in done.values())
        pool = plan_pool(extraction.num_workers, extraction.cpus_per_worker, work)
        progress.start(record.num_inputs, num_done)
        for slice_record in run(tasks, pool):
            progress.advance(slice_record.num_results, slice_record.num_rejects)
            finished.append(slice_record)
            crash_point(CrashPoint.SLICE_COLLECTED)
            lease.check()
    lease.confirm()
    return finished


def _warn_of_kept_settings(record: RunRecord, extraction: ExtractionConfig) -> None:
    """Say where a run goes on with settings that it was begun with, and that would be others now."""
    begun = record.config.get("extraction", {})
    told = extraction.model_dump(mode="json")
    kept = [
        f"extraction.{name}={begun[name]}, not {told[name]}"
        for name in _SETTLED_AT_THE_START
        if name in extraction.model_fields_set and name in begun and begun[name] != told[name]
    ]
    if kept:
        _log.warning(
            "run %s goes on as it was begun, with %s; --new-run takes the new ones",
            record.run_id,
            ", ".join(kept),
        )
