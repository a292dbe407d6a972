"""The steps of planning that `convoy bench plan` measures, each case in a process of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from plan_workspace import GROWN_SET, MANIFEST_KEY, num_missing, num_recorded

from convoy.cluster.slices import SliceTask
from convoy.core.config import StrictModel
from convoy.core.errors import ConvoyError
from convoy.core.fingerprints import digest
from convoy.core.result_columns import PartitionBy
from convoy.storage.commits import choose_attempts, read_manifest, read_records
from convoy.storage.feature_cache import FeatureCache
from convoy.storage.local_store import LocalStore
from convoy.storage.manifests import Manifest
from convoy.storage.run_input import freeze_input, missing_rows, slice_rows_for
from convoy.storage.runs import OpenRun, RunFolder, RunRecord
from convoy.storage.scores import partitioned

_BATCH_SIZE = 32
_VERB = "score"


class StepCost(StrictModel):
    """One step of planning: its time, that of the processor, and its peak of resident memory.

    `peak_mib` counts from the process after its imports, so all that earlier steps left behind is in it; `rss_mib`
    is the whole process.
    """

    seconds: float
    cpu_s: float
    peak_mib: float
    rss_mib: float


class Measured(NamedTuple):
    """The costs of a case by step, and the run that it planned or went on with."""

    costs: dict[str, StepCost]
    run_id: str = ""


class StepMeter:
    """Measures the steps of this process one after another, by Linux' own account of its resident memory."""

    def __init__(self) -> None:
        self.costs: dict[str, StepCost] = {}
        self._baseline_kib = _status_kib("VmRSS")

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Measure what runs inside; in Linux, 5 in clear_refs sets the highest size back to the current one."""
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        started_s, started_cpu_s = time.perf_counter(), time.process_time()
        yield
        highest_kib = _status_kib("VmHWM")
        self.costs[name] = StepCost(
            seconds=time.perf_counter() - started_s,
            cpu_s=time.process_time() - started_cpu_s,
            peak_mib=(highest_kib - self._baseline_kib) / 1024,
            rss_mib=highest_kib / 1024,
        )


def plan_scoring(root: str, target: str) -> Measured:
    """The steps of `convoy score` from the dataset's name to the tasks for Ray, in the same order.

    Raises ConvoyError where other rows or slices come out than the manifest has.
    """
    store, meter = LocalStore(root), StepMeter()
    with meter.step("open"):
        manifest = Manifest.open(store, MANIFEST_KEY)
        open_run = OpenRun(store, verb=_VERB, target=target)
        open_run.resume(_identity(manifest), new_run=False)
        folder = open_run.start()
    with meter.step("freeze"):
        groups = freeze_input(
            folder,
            partitioned(manifest.iter_batches(), PartitionBy.NONE, manifest.classes),
            slice_rows=slice_rows_for(manifest.num_samples, _BATCH_SIZE),
        )
        record = RunRecord.new(
            folder.run_id,
            verb=_VERB,
            identity=_identity(manifest),
            config={},
            outputs={output: folder.key(f"{output}/") for group in groups for output in group.outputs},
            groups=groups,
        )
        folder.write_record(record)
    tasks = _plan_tasks(meter, folder, record)
    _require_equal(record.num_inputs, manifest.num_samples, "frozen rows")
    _require_equal(len(tasks), record.num_slices, "tasks")
    return Measured(meter.costs, folder.run_id)


def resume_scoring(root: str, target: str) -> Measured:
    """The steps of the same command when it goes on with the run of a target, of which half is recorded."""
    store, meter = LocalStore(root), StepMeter()
    with meter.step("open"):
        manifest = Manifest.open(store, MANIFEST_KEY)
        open_run = OpenRun(store, verb=_VERB, target=target)
        folder, record = open_run.resume(_identity(manifest), new_run=False)
    if folder is None or record is None:
        raise ConvoyError("the run that was planned is not found again", where=target)
    tasks = _plan_tasks(meter, folder, record)
    _require_equal(len(tasks), record.num_slices - num_recorded(record), "tasks")
    return Measured(meter.costs, folder.run_id)


def plan_new_features(root: str, run_id: str) -> Measured:
    """The steps of `FeatureJob` where nothing is cached."""
    return _plan_features(root, run_id, digest("new"))


def plan_missing_features(root: str, run_id: str) -> Measured:
    """The steps of `FeatureJob` where most rows are cached."""
    return _plan_features(root, run_id, GROWN_SET)


def _plan_features(root: str, run_id: str, set_id: str) -> Measured:
    store, meter = LocalStore(root), StepMeter()
    with meter.step("open"):
        manifest = Manifest.open(store, MANIFEST_KEY)
    with meter.step("known"):
        known = {set_id: FeatureCache(store).known_content(set_id)}
    with meter.step("count"):
        num_counted = sum(
            rows.num_rows for _, rows in missing_rows(manifest.iter_batches(("content_id",)), known)
        )
    with meter.step("freeze"):
        groups = freeze_input(
            RunFolder(store, run_id),
            missing_rows(manifest.iter_batches(), known),
            slice_rows=slice_rows_for(num_counted, _BATCH_SIZE),
        )
    num_expected = num_missing(manifest.num_samples) if set_id == GROWN_SET else manifest.num_samples
    _require_equal(num_counted, num_expected, "missing rows")
    _require_equal(sum(group.num_rows for group in groups), num_expected, "frozen rows")
    return Measured(meter.costs, run_id)


def _plan_tasks(meter: StepMeter, folder: RunFolder, record: RunRecord) -> list[SliceTask]:
    """The slices that are left to do, as `do_slices` finds them."""
    with meter.step("records"):
        records = [] if read_manifest(folder) else read_records(folder)
    with meter.step("choose"):
        done = choose_attempts(folder, record, records)
    with meter.step("tasks"):
        return [
            SliceTask(slice=name, outputs=record.outputs_of(name))
            for name in record.slice_names()
            if name not in done
        ]


def _identity(manifest: Manifest) -> dict[str, Any]:
    return {"dataset_fingerprint": manifest.fingerprint}


def _require_equal(found: int, expected: int, what: str) -> None:
    if found != expected:
        raise ConvoyError(f"{found} {what}, not {expected}")


def _status_kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
