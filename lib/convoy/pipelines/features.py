"""The step that cache, train and evaluate share: see to it that features exist, computing only what is missing."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from convoy.cluster.extraction_spec import ExtractionSpec, FeatureOutput
from convoy.cluster.feature_extraction import extract_slices
from convoy.cluster.network_device import known_device
from convoy.cluster.slices import PlannedWork, SliceTask, WorkerPool
from convoy.core.fingerprints import digest
from convoy.core.progress import Progress
from convoy.pipelines.backbone_record import BackboneRecord
from convoy.pipelines.device_settings import settle_batch_size, settle_precision
from convoy.pipelines.feature_plan import (
    ExtractionConfig,
    FeatureRequest,
    forecast_forward_s,
    plan_compile,
    plan_sets,
    run_identity,
    set_labels,
)
from convoy.pipelines.feature_summary import FeaturePlan, FeatureSummary, slice_totals, timings
from convoy.pipelines.slice_work import do_slices
from convoy.pipelines.training_rows import rows_digest
from convoy.storage.commits import (
    SliceRecord,
    feature_prefix,
    finish,
    publish,
    read_commits,
    read_records,
)
from convoy.storage.feature_cache import FeatureCache, FeatureSetSpec, KnownContent, content_id_array
from convoy.storage.leases import RunLease, WhenHeld, hold_run, take_up
from convoy.storage.manifests import Manifest
from convoy.storage.object_store import ObjectStore
from convoy.storage.parts import FEATURES_SCHEMA_VERSION
from convoy.storage.run_input import freeze_input, missing_rows, slice_rows_for, write_frozen_record
from convoy.storage.runs import OpenRun, RunFolder, RunRecord, refuse_changed_identity
from convoy.vision.augmentation_policy import EVAL_VIEW, AugmentationPolicy
from convoy.vision.engine_options import EngineOptions, Precision

_VERB = "cache"
# All that counting needs of a manifest.
_COUNTED = ("content_id",)


@dataclass(frozen=True, slots=True)
class _Lacking:
    """How many rows lack something, and what each set has: not looked at where a frozen input is gone on with."""

    known: Mapping[str, KnownContent]
    num_rows: int


class FeatureJob:
    """One request for features against one workspace. `rows` are rows of the manifest instead of whole splits.

    A precision of `auto` is settled when the job is made.
    """

    def __init__(
        self,
        store: ObjectStore,
        manifest: Manifest,
        backbone: BackboneRecord,
        request: FeatureRequest,
        extraction: ExtractionConfig,
        *,
        rows: pa.Table | None = None,
    ) -> None:
        self._store = store
        self._rows = rows
        self._manifest = manifest
        self._backbone = backbone
        self._request = request
        self._extraction, self._precision_notes = settle_precision(store, request.dataset, extraction)
        self._cache = FeatureCache(store)
        self.sets = plan_sets(backbone, request, self._extraction)
        drawn = [policy for _ in dict.fromkeys(request.taps) for policy, _ in request.drawn_views]
        self._policy_of = {spec.set_id: policy for spec, policy in zip(self.sets, drawn, strict=True)}
        self._target = [request.dataset, [spec.set_id for spec in self.sets]]
        self._open_run = OpenRun(store, verb=_VERB, target=digest(self._target))

    def set_id(self, tap: str | int, view: int = EVAL_VIEW, policy: AugmentationPolicy | None = None) -> str:
        """The id of the set that holds a tap of a view; `policy` says whose, where several draw it."""
        wanted = (self._backbone.resolve_tap(tap), view)
        return next(
            spec.set_id
            for spec in self.sets
            if (spec.tap, spec.view) == wanted
            and (policy is None or view == EVAL_VIEW or self._policy_of[spec.set_id] == policy)
        )

    def ensure(
        self,
        *,
        progress: Progress,
        new_run: bool = False,
        when_held: WhenHeld = WhenHeld.WAIT,
        note_missing: Callable[[int], None] | None = None,
    ) -> FeatureSummary:
        """Compute and commit whatever the cache lacks; a killed call goes on where it stopped.

        A driver that is computing the same at the moment is waited for, or refused with a LeaseHeld. An unfinished
        run for other inputs is left to whoever began it by a call that waits, and refused with a RunMismatch by
        the other. `note_missing` hears how many rows there are to do, or were when the killed call began, before any
        of them is done.
        """
        started_unix_s = time.time()
        for spec in self.sets:
            self._cache.describe(spec)
        progress.stage("looking for missing features")
        identity = self._identity()
        waits = when_held is WhenHeld.WAIT
        open_run = self._run_beside_others(identity) if waits else self._open_run
        opened = self._resume_or_start(open_run, identity, new_run=new_run, when_held=when_held)
        if opened is None:
            return self._summary(None, (), [], started_unix_s)
        folder, lacking = opened
        if note_missing is not None:
            note_missing(lacking.num_rows)
        with hold_run(folder, when_held=when_held) as lease:
            if not folder.is_finished() and not (waits and open_run.is_anothers(identity)):
                record = folder.record() or self._freeze(folder, lease, identity, lacking)
                refuse_changed_identity(record, identity)
                return self._end(open_run, folder, record, lease, progress, started_unix_s)
        # The driver that was waited for has finished it, or had begun it for other inputs.
        return self.ensure(progress=progress, when_held=when_held)

    def end_run_of_other_rows(self, progress: Progress) -> str | None:
        """End the unfinished run of these sets that was begun for other rows, on the input that it froze; its id.

        Such as one of a version of the dataset that was refreshed since, or of a killed evaluation of one split. What
        it computes is right whoever asked for it: rows are known by their content. None where there is no such run;
        LeaseHeld while another driver is at it.
        """
        started_unix_s = time.time()
        folder = self._open_run.unfinished()
        record = None if folder is None else folder.record()
        if folder is None or record is None or not self._open_run.is_anothers(self._identity()):
            return None
        with hold_run(folder, when_held=WhenHeld.REFUSE) as lease:
            if not folder.is_finished():
                self._end(self._open_run, folder, record, lease, progress, started_unix_s)
        return folder.run_id

    def plan(self) -> FeaturePlan:
        """What `ensure` would do now, without writing anything."""
        missing = Counter[str]()
        num_missing = 0
        for set_ids, rows in self._missing(self._known(), _COUNTED):
            num_missing += rows.num_rows
            missing.update(dict.fromkeys(set_ids, rows.num_rows))
        folder = self._open_run.unfinished()
        choice = self._extraction.compile
        _, reason = plan_compile(self._backbone, self._request, choice, num_missing, known_device)
        return FeaturePlan(
            samples=self._count_rows()[0],
            missing=num_missing,
            missing_by_set={label: missing[spec.set_id] for label, spec in self._labelled()},
            unfinished_run=folder.run_id if folder else None,
            precision=self.sets[0].precision,
            forward_forecast_s=forecast_forward_s(self._backbone, self._request, num_missing),
            notes=[reason, *self._precision_notes],
        )

    def _identity(self) -> dict[str, Any]:
        identity = run_identity(self._manifest, self._request, self.sets)
        if self._rows is not None:
            identity["rows"] = rows_digest(self._rows)
        return identity

    def _run_beside_others(self, identity: dict[str, Any]) -> OpenRun:
        """The pointer of the target, or, while that is another's or a killed call began one, one for this identity."""
        own = OpenRun(self._store, verb=_VERB, target=digest([*self._target, identity]))
        is_needed = own.current() is not None or self._open_run.is_anothers(identity)
        return own if is_needed else self._open_run

    def _resume_or_start(
        self, open_run: OpenRun, identity: dict[str, Any], *, new_run: bool, when_held: WhenHeld
    ) -> tuple[RunFolder, _Lacking] | None:
        """The unfinished run of a pointer, or a new one, or None if nothing is missing."""
        folder, record = take_up(open_run, identity, new_run=new_run, when_held=when_held)
        if folder is not None and record is not None:
            return folder, _Lacking({}, record.num_inputs)
        known = self._known()
        num_missing = sum(rows.num_rows for _, rows in self._missing(known, _COUNTED))
        if not num_missing:
            if folder is not None:
                open_run.close(folder)
            return None
        return folder or open_run.start(), _Lacking(known, num_missing)

    def _known(self) -> dict[str, KnownContent]:
        return {spec.set_id: self._cache.known_content(spec.set_id) for spec in self.sets}

    def _missing(
        self, known: Mapping[str, KnownContent], columns: Sequence[str] | None = None
    ) -> Iterator[tuple[tuple[str, ...], pa.Table]]:
        return missing_rows(self._batches(columns), known)

    def _batches(self, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch | pa.Table]:
        if self._rows is not None:
            return iter([self._rows if columns is None else self._rows.select(columns)])
        return self._manifest.iter_batches(columns, splits=self._request.splits)

    def _freeze(
        self, folder: RunFolder, lease: RunLease, identity: dict[str, Any], lacking: _Lacking
    ) -> RunRecord:
        extraction = self._extraction
        compiled, reason = plan_compile(self._backbone, self._request, extraction.compile, lacking.num_rows)
        crop_px = self._backbone.preset.crop_px
        batch_size = settle_batch_size(
            self._store,
            self._request.dataset,
            extraction,
            crop_px,
            num_crops=len(self._request.drawn_views),
        )
        forward_s = forecast_forward_s(self._backbone, self._request, lacking.num_rows)
        slice_rows = extraction.slice_rows or slice_rows_for(lacking.num_rows, batch_size, forward_s)
        groups = freeze_input(folder, self._missing(lacking.known), slice_rows=slice_rows)
        set_ids = sorted({set_id for group in groups for set_id in group.outputs})
        record = RunRecord.new(
            folder.run_id,
            verb=_VERB,
            identity=identity,
            config={
                "request": self._request.model_dump(mode="json"),
                "extraction": extraction.model_dump(mode="json"),
            },
            outputs={set_id: feature_prefix(set_id, folder.run_id) for set_id in set_ids},
            groups=groups,
            # Decided once, so that a resumed run computes the very same numbers.
            settings={
                "compiled": compiled,
                "compile_reason": reason,
                "batch_size": batch_size,
            },
        )
        return write_frozen_record(folder, record, lease, num_rows=lacking.num_rows)

    def _end(
        self,
        open_run: OpenRun,
        folder: RunFolder,
        record: RunRecord,
        lease: RunLease,
        progress: Progress,
        started_unix_s: float,
    ) -> FeatureSummary:
        """Compute what is left of a run, and commit it."""
        finished = self._compute(folder, record, lease, progress)
        progress.stage("committing")
        manifest = publish(folder, record, read_records(folder))
        summary = self._summary(record, manifest.slices, finished, started_unix_s)
        finish(folder, summary.model_dump(mode="json"))
        open_run.close(folder)
        return summary

    def _compute(
        self, folder: RunFolder, record: RunRecord, lease: RunLease, progress: Progress
    ) -> list[SliceRecord]:
        """Run what is left to do; the records of the slices that were finished now."""

        def run(tasks: Sequence[SliceTask], pool: WorkerPool) -> Iterator[SliceRecord]:
            return extract_slices(self._spec(record, pool), tasks, pool)

        return do_slices(
            folder,
            record,
            run,
            lease=lease,
            extraction=self._extraction,
            progress=progress,
            work=PlannedWork(
                record.num_inputs,
                self._backbone.weights_bytes,
                record.num_slices,
                forecast_forward_s(self._backbone, self._request, record.num_inputs),
            ),
        )

    def _spec(self, record: RunRecord, pool: WorkerPool) -> ExtractionSpec:
        return ExtractionSpec(
            workspace=self._store.root_uri,
            run_id=record.run_id,
            backbone=self._backbone.config,
            num_classes=self._backbone.num_classes,
            weights_key=self._backbone.weights_key,
            preset=self._backbone.preset,
            decode_rule=self._extraction.decode,
            outputs=tuple(self._output(spec, record) for spec in self.sets if spec.set_id in record.outputs),
            dtype=self._extraction.dtype.value,
            engine=EngineOptions(
                precision=Precision(self.sets[0].precision),
                batch_size=record.settings["batch_size"],
                compiled=record.settings["compiled"],
                num_threads=pool.num_threads,
            ),
            num_decode_threads=pool.num_decode_threads,
            num_fetch_threads=self._extraction.num_fetch_threads,
            stall_s=self._extraction.stall_s,
        )

    def _output(self, spec: FeatureSetSpec, record: RunRecord) -> FeatureOutput:
        metadata = {
            "convoy.schema_version": str(FEATURES_SCHEMA_VERSION),
            "convoy.run_id": record.run_id,
            "convoy.set_id": spec.set_id,
            # Of which the id is the digest: what determines the rows, decode rule, transform and view among it.
            "convoy.spec": spec.model_dump_json(),
            "convoy.arch": spec.arch,
            "convoy.weights_digest": spec.weights_digest,
            "convoy.tap": spec.tap,
            "convoy.view": str(spec.view),
            "convoy.precision": spec.precision,
            "convoy.dataset_fingerprint": record.identity["dataset_fingerprint"],
        }
        return FeatureOutput(
            set_id=spec.set_id,
            prefix=record.outputs[spec.set_id],
            tap=spec.tap,
            view=spec.view,
            augmentation=self._policy_of[spec.set_id],
            metadata=metadata,
        )

    def _summary(
        self,
        record: RunRecord | None,
        slices: Sequence[SliceRecord],
        finished: Sequence[SliceRecord],
        started_unix_s: float,
    ) -> FeatureSummary:
        samples, lost = self._count_rows()
        # Those that earlier runs rejected are in no slice of this one.
        codes = self._cache.count_rejects([spec.set_id for spec in self.sets], lost)
        return FeatureSummary(
            run=record.run_id if record else self._last_run(),
            samples=samples,
            rows=samples - len(lost),
            rejects=len(lost),
            sets={label: spec.set_id for label, spec in self._labelled()},
            precision=self.sets[0].precision,
            notes=[
                record.settings["compile_reason"] if record else "nothing was missing",
                *self._precision_notes,
            ],
            job_s=time.time() - started_unix_s,
            **{**slice_totals(slices), "reject_codes": codes},
            **timings(finished, started_unix_s),
        )

    def _labelled(self) -> Iterator[tuple[str, FeatureSetSpec]]:
        return zip(set_labels(self.sets), self.sets, strict=True)

    def _count_rows(self) -> tuple[int, np.ndarray]:
        """Samples of the request, and the content ids of those that have no row in one of the sets."""
        known = self._known().values()
        samples = 0
        lost = [np.empty(0, "S16")]
        for batch in self._batches(_COUNTED):
            samples += batch.num_rows
            has_all = np.logical_and.reduce([one.has_rows(batch["content_id"]) for one in known])
            lost.append(content_id_array(batch["content_id"])[~has_all])
        return samples, np.concatenate(lost)

    def _last_run(self) -> str | None:
        commits = (commit for spec in self.sets for commit in read_commits(self._store, spec.set_id))
        last = max(commits, key=lambda commit: commit.committed_unix_s, default=None)
        return last.run_id if last else None
