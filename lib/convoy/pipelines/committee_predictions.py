"""Predictions of a committee for every sample of some splits: frozen input, slices, commit, like any run.

A finished run is found again through `predictions/<digest of what determines it>.json`, so the same request is
answered from what is stored; a request that keeps less is answered by a run that kept more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from convoy.cluster.committee_scoring import score_slices
from convoy.cluster.slices import SliceTask, WorkerPool
from convoy.core.crop_policies import EvaluationMode, MemberOutputs
from convoy.core.errors import ConfigError, RunMismatch
from convoy.core.fingerprints import canonical_json, digest
from convoy.core.progress import Progress
from convoy.core.records import RETRIED_CODES, RejectCode, codes_in_words
from convoy.pipelines.committees import CommitteeRecord
from convoy.pipelines.feature_summary import slice_totals, timings
from convoy.pipelines.prediction_request import PredictionRequest
from convoy.pipelines.scoring_plan import labels_in_committee, scoring_settings, scoring_spec
from convoy.pipelines.slice_work import do_slices, done_slices
from convoy.storage.commits import (
    RunManifest,
    SliceRecord,
    finish,
    publish,
    read_manifest,
    read_records,
)
from convoy.storage.feature_cache import KnownContent
from convoy.storage.leases import RunLease, WhenHeld, hold_run, take_up
from convoy.storage.manifests import Manifest
from convoy.storage.member_predictions import member_output
from convoy.storage.object_store import ObjectStore
from convoy.storage.predictions import PREDICTIONS
from convoy.storage.run_input import freeze_input, missing_rows, write_frozen_record
from convoy.storage.runs import OpenRun, RunFolder, RunRecord, finished_run, refuse_changed_identity
from convoy.storage.scores import partitioned
from convoy.vision.committee_options import gate_passes

_POINTERS = "predictions/"
# Runs that kept as much answer a request, or more: of views the means can be taken.
_BY_MUCH_KEPT = (MemberOutputs.NONE, MemberOutputs.MEMBERS, MemberOutputs.VIEWS)


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitteePredictions:
    """A committed run: what it kept, its steady rate, seconds by stage, and what was counted, whenever it ran.

    `finished` are the slices that were computed by this call.
    """

    run_id: str
    keep: MemberOutputs
    manifest: RunManifest
    finished: tuple[SliceRecord, ...]
    images_per_s: float | None
    seconds: dict[str, float]
    flags: dict[str, int]

    @property
    def reject_codes(self) -> dict[str, int]:
        """How many images were rejected for each reason."""
        codes: dict[str, int] = slice_totals(self.manifest.slices)["reject_codes"]
        return codes

    @property
    def unfetched(self) -> int:
        """How many of the rejects are images that could not be fetched, which another try may."""
        return sum(record.unfetched for record in self.manifest.slices)

    def fetch_notes(self) -> list[str]:
        """How to come by the images that could not be fetched, for people; nothing where all were."""
        codes = self.reject_codes
        notes = []
        if retried := {code: number for code, number in codes.items() if code in RETRIED_CODES}:
            notes.append(
                f"images that could not be fetched: {codes_in_words(retried)}. They stay rejects of this run; once they"
                f" can be had again, `convoy runs repair {self.run_id} --retry-unfetched --apply` and the same command"
                " try their slices again"
            )
        if changed := codes.get(RejectCode.CHANGED):
            notes.append(
                f"{changed} images were replaced since the dataset was frozen: `convoy dataset` freezes the new ones"
            )
        return notes

    def report(self) -> dict[str, Any]:
        """What the run's folder says of it, if nobody has more to say."""
        return {"run": self.run_id, "images_per_s": self.images_per_s, "seconds": self.seconds}


@dataclass(frozen=True, slots=True)
class BegunRun:
    """A run that is there already, and the slices of it that are done."""

    record: RunRecord
    done: tuple[SliceRecord, ...]
    is_finished: bool

    @property
    def slices_left(self) -> int:
        """Slices that are not done."""
        return self.record.num_slices - len(self.done)

    @property
    def slice_rows_left(self) -> list[int]:
        """The rows of each of them."""
        done = {one.slice for one in self.done}
        return [self.record.rows_of(name) for name in self.record.slice_names() if name not in done]


class CommitteeJob:
    """One request against one workspace."""

    def __init__(self, store: ObjectStore, manifest: Manifest, request: PredictionRequest) -> None:
        if request.mode is EvaluationMode.GATED:
            require_gate(request.committee)
            # Not every member sees every image.
            request = request.keeping(MemberOutputs.NONE)
        # Refuses classes that do not match before anything is computed.
        labels_in_committee(manifest, request)
        self._store, self._manifest, self._request = store, manifest, request.settled(store)

    def ensure(
        self,
        *,
        progress: Progress,
        config: dict[str, Any],
        new_run: bool = False,
        when_held: WhenHeld = WhenHeld.REFUSE,
        describe: Callable[[CommitteePredictions], dict[str, Any]] = CommitteePredictions.report,
    ) -> CommitteePredictions:
        """Predict what no run has predicted yet; a killed call goes on where it stopped.

        A call with `new_run` that was killed is gone on with by one without.

        `describe` gives what the folder of a run that ends now says of it. Where another driver is at work on the
        same request, LeaseHeld is raised, or its end waited for.
        """
        request = self._request
        identity = request.identity(self._manifest)
        open_run = self._open_run()
        is_begun = open_run.begins_anew(new_run) or open_run.is_open_for(identity)
        if not is_begun and (known := self._known()) is not None:
            progress.stage("the predictions are there already")
            return known
        progress.stage("predicting")
        folder, record = self._resume(open_run, identity, new_run=new_run, when_held=when_held)
        folder = folder or open_run.start()
        with hold_run(folder, when_held=when_held) as lease:
            if folder.is_finished() and (known := self._known()) is not None:
                # By a driver that was at work until now.
                return known
            record = record or folder.record() or self._freeze(folder, lease, identity, config)
            refuse_changed_identity(record, identity)
            finished = self._compute(folder, record, lease, progress)
            progress.stage("committing")
            manifest = publish(folder, record, read_records(folder))
            found = _found(folder, manifest, finished, request.keep)
            # Before the marker, without which it does not count: a run that is killed behind that is found again.
            self._store.put(self._pointer(request), canonical_json({"run_id": folder.run_id}))
            finish(folder, describe(found))
            open_run.close(folder)
        return found

    def _resume(
        self, open_run: OpenRun, identity: dict[str, Any], *, new_run: bool, when_held: WhenHeld
    ) -> tuple[RunFolder | None, RunRecord | None]:
        try:
            return take_up(open_run, identity, new_run=new_run, when_held=when_held)
        except RunMismatch as error:
            if self._request.scores is None:
                raise
            next_step = (
                f"give this scoring a name of its own (--name) to leave that run alone, or {error.next_step}"
            )
            raise RunMismatch(error.what, where=error.where, next_step=next_step) from error

    def is_barred(self) -> bool:
        """Whether `ensure` would refuse, as the unfinished run of the same target is that of another request."""
        return self._open_run().is_anothers(self._request.identity(self._manifest))

    def begun(self, *, new_run: bool) -> BegunRun | None:
        """The run that `ensure` would go on with or be answered by, if there is one whose input is frozen."""
        open_run = self._open_run()
        if open_run.begins_anew(new_run):
            return None
        folder = None
        if open_run.is_open_for(self._request.identity(self._manifest)):
            folder = open_run.unfinished()
        elif (known := self._known()) is not None:
            folder = RunFolder(self._store, known.run_id)
        record = None if folder is None else folder.record()
        if folder is None or record is None:
            return None
        return BegunRun(record, tuple(done_slices(folder, record).values()), is_finished=folder.is_finished())

    def discard(self, found: CommitteePredictions) -> None:
        """Forget predictions that were made to be thrown away, and delete their files."""
        folder = RunFolder(self._store, found.run_id)
        self._store.delete([self._pointer(self._request)])
        self._store.delete([info.key for info in self._store.list_objects(folder.prefix)])

    def _open_run(self) -> OpenRun:
        request = self._request
        return OpenRun(self._store, verb=request.verb, target=request.target(self._manifest))

    def _known(self) -> CommitteePredictions | None:
        """A finished run that answers the request."""
        for keep in _BY_MUCH_KEPT[_BY_MUCH_KEPT.index(self._request.keep) :]:
            folder = finished_run(self._store, self._pointer(self._request.keeping(keep)))
            manifest = None if folder is None else read_manifest(folder)
            if folder is not None and manifest is not None:
                return _found(folder, manifest, (), keep)
        return None

    def _pointer(self, request: PredictionRequest) -> str:
        return f"{_POINTERS}{digest(request.identity(self._manifest))}.json"

    def _freeze(
        self, folder: RunFolder, lease: RunLease, identity: dict[str, Any], config: dict[str, Any]
    ) -> RunRecord:
        request = self._request
        batch_size = request.batch_size(self._store, self._manifest)
        slice_rows = request.slice_rows(self._manifest, batch_size)
        groups = freeze_input(folder, self._rows_by_output(), slice_rows=slice_rows)
        outputs = sorted({output for group in groups for output in group.outputs})
        record = RunRecord.new(
            folder.run_id,
            verb=request.verb,
            identity=identity,
            config=config,
            outputs={output: folder.key(f"{output}/") for output in outputs},
            groups=groups,
            settings=scoring_settings(self._manifest, request, batch_size),
        )
        return write_frozen_record(folder, record, lease, num_rows=request.num_rows(self._manifest))

    def _rows_by_output(self) -> Iterator[tuple[tuple[str, ...], pa.Table]]:
        request = self._request
        batches = request.batches(self._manifest)
        if request.scores is not None:
            return partitioned(batches, request.scores.partition_by, self._manifest.classes)
        outputs = [PREDICTIONS]
        if request.keep is not MemberOutputs.NONE:
            outputs += [member_output(index) for index in range(len(request.committee.members))]
        nothing = np.empty(0, "S16")
        return missing_rows(batches, dict.fromkeys(outputs, KnownContent(nothing, nothing)))

    def _compute(
        self, folder: RunFolder, record: RunRecord, lease: RunLease, progress: Progress
    ) -> list[SliceRecord]:
        """Run what is left to do; the records of the slices that were finished now."""

        def run(tasks: Sequence[SliceTask], pool: WorkerPool) -> Iterator[SliceRecord]:
            spec = scoring_spec(self._store, self._manifest, self._request, record, pool)
            return score_slices(spec, tasks, pool)

        extraction = self._request.extraction
        return do_slices(
            folder,
            record,
            run,
            lease=lease,
            extraction=extraction,
            progress=progress,
            work=self._request.planned or self._request.work(record.num_inputs, record.num_slices),
        )


def _found(
    folder: RunFolder, manifest: RunManifest, finished: Sequence[SliceRecord], keep: MemberOutputs
) -> CommitteePredictions:
    measured = timings(finished or manifest.slices, 0.0)
    return CommitteePredictions(
        run_id=folder.run_id,
        keep=keep,
        manifest=manifest,
        finished=tuple(finished),
        images_per_s=measured["images_per_s"],
        seconds=measured["seconds"],
        flags=slice_totals(manifest.slices)["flags"],
    )


def require_gate(committee: CommitteeRecord) -> None:
    """Raise ConfigError unless the committee has a gate that fits its members and crops."""
    if committee.gate is None:
        raise ConfigError(
            "the committee has no gate that was calibrated for its crops",
            where="mode gated",
            next_step="set gate, or let convoy tune build an ensemble with ensemble.gate",
        )
    gate_passes(committee.gate, committee.plan, len(committee.members))
