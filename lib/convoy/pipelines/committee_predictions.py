"""Predictions of a committee for every sample of some splits: frozen input, slices, commit, like any run.

A finished run is found again through `predictions/<digest of what determines it>.json`, so the same request is
answered from what is stored; a request that keeps less is answered by a run that kept more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from convoy.cluster.committee_scoring import score_slices
from convoy.cluster.scoring_spec import MemberSpec, ScoringSpec
from convoy.cluster.slices import SliceTask, WorkerPool
from convoy.core.crop_policies import CropPlan, CropPolicy, EvaluationMode, MemberOutputs, crop_views
from convoy.core.errors import ConfigError
from convoy.core.fingerprints import canonical_json, digest
from convoy.core.progress import Progress
from convoy.core.records import Split
from convoy.pipelines.committees import CommitteeMember, CommitteeRecord
from convoy.pipelines.feature_plan import (
    ExtractionConfig,
    compile_decision,
    forward_s,
    resolve_precision,
)
from convoy.pipelines.feature_summary import slice_totals, timings
from convoy.pipelines.predictions import class_indices
from convoy.pipelines.slice_work import do_slices
from convoy.pipelines.training_rows import rows_digest
from convoy.storage.bundles import MODEL_FILE
from convoy.storage.commits import (
    RunManifest,
    SliceRecord,
    finish,
    publish,
    read_manifest,
    read_records,
)
from convoy.storage.documents import read_json
from convoy.storage.feature_cache import KnownContent
from convoy.storage.manifests import Manifest
from convoy.storage.member_predictions import member_output
from convoy.storage.object_store import ObjectStore
from convoy.storage.predictions import PREDICTIONS, PREDICTIONS_SCHEMA_VERSION
from convoy.storage.run_input import freeze_input, missing_rows, slice_rows_for
from convoy.storage.runs import OpenRun, RunFolder, RunRecord
from convoy.vision.committee_options import CommitteeOptions, GateOptions, MemberOptions, gate_passes
from convoy.vision.engine_options import Precision
from convoy.vision.presets import EvalPreset, dense_preset

_VERB = "evaluate"
_POINTERS = "predictions/"
# Runs that kept as much answer a request, or more: of views the means can be taken.
_BY_MUCH_KEPT = (MemberOutputs.NONE, MemberOutputs.MEMBERS, MemberOutputs.VIEWS)


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictionRequest:
    """Which samples a committee predicts, and how. `rows` are rows of the manifest instead of whole splits."""

    committee: CommitteeRecord
    dataset: str
    splits: tuple[Split, ...]
    extraction: ExtractionConfig
    keep: MemberOutputs = MemberOutputs.NONE
    mode: EvaluationMode = EvaluationMode.EXACT
    rows: pa.Table | None = None

    @property
    def plan(self) -> CropPlan:
        """The crops that networks see: in the dense mode the whole square and its mirror image."""
        is_dense = self.mode is EvaluationMode.DENSE
        return CropPlan(policy=CropPolicy.FLIP) if is_dense else self.committee.plan

    def preset(self, member: CommitteeMember) -> EvalPreset:
        """How a member's images are prepared."""
        preset = member.classifier.backbone.preset
        return dense_preset(preset) if self.mode is EvaluationMode.DENSE else preset

    def in_mode(self, mode: EvaluationMode) -> PredictionRequest:
        """The same request in another mode."""
        return replace(self, mode=mode)


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitteePredictions:
    """A committed run: what it kept, its steady rate, seconds by stage, and what was counted, whenever it ran."""

    run_id: str
    keep: MemberOutputs
    manifest: RunManifest
    images_per_s: float | None
    seconds: dict[str, float]
    flags: dict[str, int]


class CommitteeJob:
    """One request against one workspace."""

    def __init__(self, store: ObjectStore, manifest: Manifest, request: PredictionRequest) -> None:
        self._store, self._manifest, self._request = store, manifest, request
        committee = request.committee
        self._class_of_label = class_indices(manifest.classes, committee.classes)
        self._outputs = [PREDICTIONS]
        if request.mode is EvaluationMode.GATED:
            _require_gate(committee)
            # Not every member sees every image.
            self._request = request = replace(request, keep=MemberOutputs.NONE)
        if request.keep is not MemberOutputs.NONE:
            self._outputs += [member_output(index) for index in range(len(committee.members))]

    def ensure(
        self, *, progress: Progress, config: dict[str, Any], new_run: bool = False
    ) -> CommitteePredictions:
        """Predict what no run has predicted yet; a killed call goes on where it stopped."""
        if not new_run and (known := self._known()) is not None:
            progress.stage("the predictions are there already")
            return known
        progress.stage("predicting")
        identity = self._identity(self._request.keep)
        open_run = OpenRun(self._store, verb=_VERB, target=digest(identity))
        folder, record = open_run.resume(identity, new_run=new_run)
        folder = folder or open_run.start()
        record = record or folder.record() or self._freeze(folder, identity, config)
        finished = self._compute(folder, record, progress)
        manifest = publish(folder, record, read_records(folder))
        found = self._found(folder, manifest, finished, self._request.keep)
        # Before the marker, without which it does not count: a run that is killed behind that is found again.
        self._store.put(self._pointer(self._request.keep), canonical_json({"run_id": folder.run_id}))
        finish(folder, {"run": folder.run_id, "images_per_s": found.images_per_s, "seconds": found.seconds})
        open_run.close()
        return found

    def _known(self) -> CommitteePredictions | None:
        """A finished run that answers the request."""
        for keep in _BY_MUCH_KEPT[_BY_MUCH_KEPT.index(self._request.keep) :]:
            document = read_json(self._store, self._pointer(keep))
            if document is None:
                continue
            folder = RunFolder(self._store, document["run_id"])
            manifest = read_manifest(folder) if folder.is_finished() else None
            if manifest is not None:
                return self._found(folder, manifest, (), keep)
        return None

    def _pointer(self, keep: MemberOutputs) -> str:
        return f"{_POINTERS}{digest(self._identity(keep))}.json"

    def _identity(self, keep: MemberOutputs) -> dict[str, Any]:
        request, committee = self._request, self._request.committee
        rows = request.rows
        return {
            "dataset": request.dataset,
            "dataset_fingerprint": self._manifest.fingerprint,
            "splits": sorted(request.splits),
            "rows": None if rows is None else rows_digest(rows),
            "committee": committee.digest,
            "precision": [self._precision(member).value for member in committee.members],
            "crops": request.plan.model_dump(mode="json"),
            "mode": request.mode.value,
            "gate": None if (gate := self._gate) is None else gate.model_dump(mode="json"),
            "keep": keep.value,
        }

    @property
    def _gate(self) -> GateOptions | None:
        return self._request.committee.gate if self._request.mode is EvaluationMode.GATED else None

    def _batches(self) -> Iterator[pa.Table | pa.RecordBatch]:
        if self._request.rows is not None:
            return iter([self._request.rows])
        return iter(self._manifest.iter_batches(splits=self._request.splits))

    def _num_rows(self) -> int:
        if self._request.rows is not None:
            return int(self._request.rows.num_rows)
        counts = self._manifest.counts
        return sum(counts[split].num_samples for split in self._request.splits if split in counts)

    def _freeze(self, folder: RunFolder, identity: dict[str, Any], config: dict[str, Any]) -> RunRecord:
        extraction = self._request.extraction
        macs = sum(member.classifier.backbone.macs for member in self._request.committee.members)
        forecast_s = forward_s(self._num_rows() * len(crop_views(self._request.plan)) * macs)
        compiled, reason = compile_decision(extraction.compile, forecast_s)
        nothing = np.empty(0, "S16")
        rows = missing_rows(self._batches(), dict.fromkeys(self._outputs, KnownContent(nothing, nothing)))
        slice_rows = extraction.slice_rows or slice_rows_for(self._num_rows(), extraction.batch_size)
        record = RunRecord.new(
            folder.run_id,
            verb=_VERB,
            identity=identity,
            config=config,
            outputs={output: folder.key(f"{output}/") for output in self._outputs},
            groups=freeze_input(folder, rows, slice_rows=slice_rows),
            # Decided once, so that a resumed run computes the very same numbers.
            settings={
                "compiled": compiled,
                "compile_reason": reason,
                "batch_size": extraction.batch_size,
            },
        )
        folder.write_record(record)
        return record

    def _compute(self, folder: RunFolder, record: RunRecord, progress: Progress) -> list[SliceRecord]:
        """Run what is left to do; the records of the slices that were finished now."""

        def run(tasks: Sequence[SliceTask], pool: WorkerPool) -> Iterator[SliceRecord]:
            return score_slices(self._spec(record, pool), tasks, pool)

        return do_slices(folder, record, run, extraction=self._request.extraction, progress=progress)

    def _spec(self, record: RunRecord, pool: WorkerPool) -> ScoringSpec:
        request, committee = self._request, self._request.committee
        return ScoringSpec(
            workspace=self._store.root_uri,
            run_id=record.run_id,
            members=tuple(self._member_spec(member) for member in committee.members),
            classes=committee.classes,
            class_of_label=tuple(self._class_of_label),
            gives_probabilities=committee.gives_probabilities,
            model_digest=committee.digest,
            committee=CommitteeOptions(
                batch_size=record.settings["batch_size"],
                compiled=record.settings["compiled"],
                num_threads=pool.num_threads,
                plan=request.plan,
                averaging=committee.averaging,
                temperature=committee.temperature,
            ),
            gate=self._gate,
            is_dense=request.mode is EvaluationMode.DENSE,
            keep=request.keep,
            decode_rule=committee.members[0].classifier.decode_rule,
            outputs=record.outputs,
            metadata={
                "convoy.schema_version": str(PREDICTIONS_SCHEMA_VERSION),
                "convoy.run_id": record.run_id,
                "convoy.model_digest": committee.digest,
                "convoy.dataset_fingerprint": self._manifest.fingerprint,
                "convoy.classes": "\n".join(committee.classes),
                "convoy.crops": request.plan.model_dump_json(),
                "convoy.averaging": committee.averaging.value,
            },
            num_decode_threads=pool.num_threads,
            num_fetch_threads=request.extraction.num_fetch_threads,
        )

    def _member_spec(self, member: CommitteeMember) -> MemberSpec:
        classifier, classes = member.classifier, self._request.committee.classes
        order = tuple(classifier.classes.index(name) for name in classes)
        head_key = None
        if classifier.head is not None:
            if member.bundle is None:
                raise ConfigError(
                    f"the head of {member.name} lies in no bundle", next_step="write its bundle first"
                )
            head_key = f"{member.bundle.folder}{MODEL_FILE}"
        return MemberSpec(
            digest=member.digest,
            backbone=classifier.backbone.config,
            weights_key=classifier.backbone.weights_key,
            tap=classifier.tap,
            head=None if classifier.head is None else classifier.head.spec,
            head_key=head_key,
            output_groups=classifier.output_groups,
            class_order=None if order == tuple(range(len(order))) else order,
            options=MemberOptions(
                preset=self._request.preset(member),
                precision=self._precision(member),
                weight=member.weight,
                temperature=member.temperature,
            ),
        )

    def _precision(self, member: CommitteeMember) -> Precision:
        extraction = member.classifier.extraction_like(self._request.extraction)
        return Precision(resolve_precision(extraction).value)

    def _found(
        self,
        folder: RunFolder,
        manifest: RunManifest,
        finished: Sequence[SliceRecord],
        keep: MemberOutputs,
    ) -> CommitteePredictions:
        measured = timings(finished or manifest.slices, 0.0)
        return CommitteePredictions(
            run_id=folder.run_id,
            keep=keep,
            manifest=manifest,
            images_per_s=measured["images_per_s"],
            seconds=measured["seconds"],
            flags=slice_totals(manifest.slices)["flags"],
        )


def _require_gate(committee: CommitteeRecord) -> None:
    """Raise ConfigError unless the committee has a gate that fits its members and crops."""
    if committee.gate is None:
        raise ConfigError(
            "the committee has no gate that was calibrated for its crops",
            where="mode gated",
            next_step="set gate, or let convoy tune build an ensemble with ensemble.gate",
        )
    gate_passes(committee.gate, committee.plan, len(committee.members))
