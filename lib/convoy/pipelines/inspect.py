"""`convoy inspect`: a sample of a dataset → its features → map, neighbours, near duplicates → pictures of the model.

A finished inspection is found again through `inspections/<digest of what determines it>.json`, so that the same
command is answered from what is stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from convoy.cluster.inspecting import inspect_slices
from convoy.cluster.inspection_spec import InspectionSpec, NetworkSpec, Piece, PieceKind
from convoy.cluster.session import ray_session
from convoy.cluster.slices import PlannedWork, SliceTask, WorkerPool
from convoy.core.fingerprints import canonical_json, digest
from convoy.core.progress import Progress
from convoy.pipelines.classifiers import keep_head
from convoy.pipelines.embedding_maps import require_method
from convoy.pipelines.inspect_config import InspectConfig, Section
from convoy.pipelines.inspect_findings import Findings, look_at_sample
from convoy.pipelines.inspect_maps import MapDrawer, write_maps
from convoy.pipelines.inspect_model import InspectedModel, open_model
from convoy.pipelines.inspect_plan import PlannedPiece, chosen_classes, chosen_stages, plan_pieces
from convoy.pipelines.inspect_report import INSPECTION, InspectionFigure, InspectionReport, read_figures
from convoy.pipelines.slice_work import do_slices
from convoy.pipelines.workspace import open_workspace
from convoy.storage.commits import SliceRecord, finish, publish, read_manifest, read_records
from convoy.storage.datasets import open_dataset
from convoy.storage.leases import RunLease, hold_run, take_up
from convoy.storage.manifests import Manifest
from convoy.storage.object_store import ObjectStore
from convoy.storage.run_input import freeze_input, write_frozen_record
from convoy.storage.runs import (
    OpenRun,
    RunFolder,
    RunRecord,
    SliceGroup,
    finished_run,
    refuse_changed_identity,
    slice_name,
)

_VERB = "inspect"
_ANSWERS = "inspections/"
_FORMAT_VERSION = 1
# What of a config has no influence on what is drawn: where, how fast, and how the model is named.
_NOT_IDENTITY: dict[str, Any] = dict.fromkeys(
    ("workspace", "writers", "bundle", "model", "extraction", "error_budget"), True
)


def run_inspect(
    config: InspectConfig, *, progress: Progress, draw_map: MapDrawer, new_run: bool = False
) -> InspectionReport:
    """Look into a model; the same call again goes on where it was killed, and is answered once it has finished.

    Raises ConfigError for an ensemble, for a class, stage or sample that does not exist, and for a map whose package
    is missing; DataError where fewer than three images of the sample can be used.
    """
    store = open_workspace(config.workspace, config.writers)
    manifest = open_dataset(store, config.dataset)
    if Section.EMBEDDING in config.sections:
        for method in config.embedding.methods:
            require_method(method)
    job = _Inspection(store, manifest, config, open_model(store, config), progress)
    return job.run(draw_map, new_run=new_run)


class _Inspection:
    """One inspection in its run folder."""

    def __init__(
        self,
        store: ObjectStore,
        manifest: Manifest,
        config: InspectConfig,
        model: InspectedModel,
        progress: Progress,
    ) -> None:
        self._store, self._manifest, self._config = store, manifest, config
        classifier = model.classifier.settled(store, config.dataset)
        self._model, self._progress = replace(model, classifier=classifier), progress
        # Refuse stages and classes that do not exist before anything is computed.
        self._stages = chosen_stages(config, classifier.backbone.axis)
        chosen_classes(config, classifier)
        self._identity: dict[str, Any] = {
            "format_version": _FORMAT_VERSION,
            "dataset": config.dataset,
            "dataset_fingerprint": manifest.fingerprint,
            "model_digest": model.digest,
            "decode_rule": classifier.decode_rule.model_dump(mode="json"),
            "precision": classifier.precision.value,
            "config": config.model_dump(mode="json", exclude=_NOT_IDENTITY),
        }
        self._pointer = f"{_ANSWERS}{digest(self._identity)}.json"

    def run(self, draw_map: MapDrawer, *, new_run: bool) -> InspectionReport:
        """The report of the finished run, or of the one that finishes now."""
        open_run = OpenRun(self._store, verb=_VERB, target=digest(self._identity))
        if not open_run.begins_anew(new_run) and (known := self._known()) is not None:
            self._progress.stage("the pictures are there already")
            return known
        folder, record = take_up(open_run, self._identity, new_run=new_run)
        with ray_session():
            found = look_at_sample(
                self._store, self._manifest, self._model.classifier, self._config, self._progress
            )
            planned = plan_pieces(self._config, self._model.classifier, found)
            folder = folder or open_run.start()
            with hold_run(folder) as lease:
                if folder.is_finished() and (known := self._known()) is not None:
                    # By a driver that was at work until now.
                    return known
                record = record or folder.record() or self._freeze(folder, lease, planned)
                refuse_changed_identity(record, self._identity)
                self._draw(folder, record, lease)
                report = self._report(folder, found, draw_map)
                self._store.put(self._pointer, canonical_json({"run_id": folder.run_id}))
                finish(folder, report.model_dump(mode="json"))
                open_run.close(folder)
        return report

    def _draw(self, folder: RunFolder, record: RunRecord, lease: RunLease) -> None:
        """Draw the pieces that are left to draw, and publish all."""

        def run(tasks: Sequence[SliceTask], pool: WorkerPool) -> Iterator[SliceRecord]:
            return inspect_slices(self._spec(record, pool), tasks, pool)

        extraction = self._config.extraction
        work = PlannedWork(record.num_inputs, num_slices=record.num_slices)
        do_slices(folder, record, run, lease=lease, extraction=extraction, progress=self._progress, work=work)
        self._progress.stage("committing")
        publish(folder, record, read_records(folder))

    def _known(self) -> InspectionReport | None:
        """The report of a finished run that answers the config."""
        folder = finished_run(self._store, self._pointer)
        if folder is None or read_manifest(folder) is None:
            return None
        report = InspectionReport.model_validate(folder.report())
        allowed = self._config.error_budget.allows(report.rejects, report.samples)
        return report.model_copy(update={"within_error_budget": allowed})

    def _freeze(self, folder: RunFolder, lease: RunLease, planned: Sequence[PlannedPiece]) -> RunRecord:
        """A slice for each piece: those that show images have them as their frozen input, the others none."""
        showing = [(one.piece, one.rows) for one in planned if one.rows is not None]
        others = [one.piece for one in planned if one.rows is None]
        rows = [((piece.name,), table) for piece, table in showing]
        most = max((table.num_rows for _, table in rows), default=1)
        groups = freeze_input(folder, rows, slice_rows=most)
        pieces = [*(piece for piece, _ in showing), *others]
        bare = [SliceGroup(outputs=(piece.name,), num_rows=0, num_slices=1) for piece in others]
        record = RunRecord.new(
            folder.run_id,
            verb=_VERB,
            identity=self._identity,
            config=self._config.model_dump(mode="json"),
            outputs={one.piece.name: folder.key(f"{INSPECTION}/") for one in planned},
            groups=(*groups, *bare),
            settings={"pieces": [piece.model_dump(mode="json") for piece in pieces]},
        )
        return write_frozen_record(
            folder, record, lease, num_rows=sum(table.num_rows for _, table in showing)
        )

    def _spec(self, record: RunRecord, pool: WorkerPool) -> InspectionSpec:
        classifier, folder = self._model.classifier, RunFolder(self._store, record.run_id)
        pieces = [Piece.model_validate(one) for one in record.settings["pieces"]]
        stages = {stage for piece in pieces for stage in piece.stages}
        return InspectionSpec(
            workspace=self._store.root_uri,
            run_id=record.run_id,
            prefix=folder.key(f"{INSPECTION}/"),
            network=NetworkSpec(
                backbone=classifier.backbone.config,
                weights_key=classifier.backbone.weights_key,
                preset=classifier.backbone.preset,
                tap=classifier.tap,
                head=None if classifier.head is None else classifier.head.spec,
                head_key=keep_head(folder, classifier),
                output_groups=classifier.output_groups,
                stages=tuple(sorted(stages)),
            ),
            maximisation=self._config.maximisation,
            decode_rule=classifier.decode_rule,
            pieces={slice_name(group, 0): piece for group, piece in enumerate(pieces)},
            num_threads=pool.num_threads,
            num_fetch_threads=self._config.extraction.num_fetch_threads,
            stall_s=self._config.extraction.stall_s,
        )

    def _report(self, folder: RunFolder, found: Findings, draw_map: MapDrawer) -> InspectionReport:
        """Write the maps, and say what there is."""
        sample, config = found.sample, self._config
        self._progress.stage("drawing the maps")
        has_maps = Section.EMBEDDING in config.sections
        maps = write_maps(folder, found, config.embedding, draw_map) if has_maps else []
        figures, notes = read_figures(folder)
        num_results = int(sample.is_counted_N.sum())
        num_samples = num_results + sample.num_rejects
        return InspectionReport(
            run=folder.run_id,
            model=self._model.name,
            model_digest=self._model.digest,
            dataset=config.dataset,
            splits=sorted(config.splits),
            samples=num_samples,
            results=num_results,
            rejects=sample.num_rejects,
            top1=None if (top1 := sample.top1) is None else top1.estimate,
            top1_interval=top1,
            neighbour_agreement=found.neighbour_agreement,
            stages=[stage.name for stage in self._stages],
            near_duplicates=found.duplicates,
            figures=_in_order([*figures, *maps]),
            notes=[*found.notes, *notes],
            folder=self._store.uri(folder.key(f"{INSPECTION}/")),
            within_error_budget=config.error_budget.allows(sample.num_rejects, num_samples),
        )


def _in_order(figures: Sequence[InspectionFigure]) -> list[InspectionFigure]:
    kinds = [*PieceKind, Section.EMBEDDING]
    return sorted(figures, key=lambda figure: (kinds.index(figure.kind), figure.name))
