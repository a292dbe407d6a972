"""Training a network on Ray Train: freeze the input, train in phases, keep the weights as a backbone record."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from convoy.cluster.session import ray_session
from convoy.cluster.training import WorkerPlan, plan_workers, run_training
from convoy.cluster.training_spec import (
    DRAW_VERSION,
    Ingest,
    TeacherRows,
    TrainingRows,
    TrainingSpec,
)
from convoy.core.errors import ClusterError, ConfigError, StorageError, TrainingError
from convoy.core.fingerprints import canonical_json, digest
from convoy.core.progress import Progress
from convoy.core.records import Split
from convoy.core.training_events import EpochResult, TrainingEvent
from convoy.pipelines.backbone_record import BackboneRecord
from convoy.pipelines.distillation import TaughtRows, taught_rows
from convoy.pipelines.head_points import RunHeadPoints
from convoy.pipelines.ingest_choice import FUSED_NOTE, settle_ingest
from convoy.pipelines.learning_curves import LearningCurves
from convoy.pipelines.network_plan import trained_backbone_config
from convoy.pipelines.network_setup import TrainingSetup, plan_on_workers, set_up_training
from convoy.pipelines.probing import TrainingInputs
from convoy.pipelines.train_config import TrainConfig
from convoy.pipelines.training_rows import (
    class_weights,
    read_split,
    validation_rows,
    weigh_classes,
    with_mean_weight_one,
)
from convoy.pipelines.wanted_training import wanted_recipe
from convoy.storage.checkpoints import training_leftovers
from convoy.storage.commits import finish
from convoy.storage.documents import read_json
from convoy.storage.leases import RunLease, WhenHeld, hold_run, take_up
from convoy.storage.manifests import Manifest
from convoy.storage.object_store import ObjectStore
from convoy.storage.runs import OpenRun, RunFolder, RunRecord, refuse_changed_identity
from convoy.storage.teacher_logits import write_teacher_logits
from convoy.vision.training_config import AUTO, Balance, Distillation, TrainingPrecision

_VERB = "train"
_TRAINED = "trained.json"
# What of an extraction changes nothing that it computes.
WHERE_AND_HOW_FAST: dict[str, Any] = dict.fromkeys(
    ("num_workers", "cpus_per_worker", "num_fetch_threads", "stall_minutes"), True
)
# What of a config may change between a kill and the next call: where and how fast, not what is computed.
NOT_IDENTITY: dict[str, Any] = {
    **dict.fromkeys(("workspace", "writers", "workers", "local_cache", "tracking", "error_budget"), True),
    **dict.fromkeys(("checkpoint_steps", "checkpoint_minutes"), True),
    "extraction": WHERE_AND_HOW_FAST,
}

CurveDrawer = Callable[[Sequence[EpochResult]], bytes]


def config_identity(config: TrainConfig) -> dict[str, Any]:
    """What of a config determines the training; its recipe is what it comes to, however much of that it spells out."""
    recipe = wanted_recipe(config).model_dump(mode="json")
    # `auto` came after trainings without it, which say `false`: these go on, as they were decided.
    recipe["sync_batchnorm"] = {AUTO: False, False: "never", True: True}[recipe["sync_batchnorm"]]
    return {**config.model_dump(mode="json", exclude=NOT_IDENTITY), "recipe": recipe}


def training_identity(manifest: Manifest, pretrained: BackboneRecord, config: TrainConfig) -> dict[str, Any]:
    """By what a run is known to be of this training: an unfinished one of another is refused."""
    return {
        "dataset_fingerprint": manifest.fingerprint,
        "weights_digest": pretrained.weights_digest,
        "config": config_identity(config),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedNetwork:
    """A trained network in the workspace, and how it came about. `notes` are for the report.

    It was given `num_train_images`, and learnt from those of them that could be used.
    """

    backbone: BackboneRecord
    setup: TrainingSetup
    num_train_images: int
    num_train_rows: int
    history: tuple[EpochResult, ...]
    reject_codes: dict[str, int]
    num_val_rows: int
    val_rejects: int
    notes: tuple[str, ...]


def open_training(store: ObjectStore, target: str) -> OpenRun:
    """The pointer to the unfinished training of a target: the name of its bundle, where it is nobody else's."""
    return OpenRun(store, verb=_VERB, target=digest([target]))


@contextmanager
def network_training(
    store: ObjectStore,
    manifest: Manifest,
    pretrained: BackboneRecord,
    config: TrainConfig,
    progress: Progress,
    *,
    new_run: bool,
    when_held: WhenHeld,
    target: str | None = None,
) -> Iterator[NetworkTraining]:
    """The training of a config, in its unfinished run or a new one; nobody else drives it until the block ends.

    Raises RunMismatch if the unfinished run is that of another training. Where another driver is at work on it,
    LeaseHeld is raised, or its end waited for.
    """
    open_run = open_training(store, target or config.name)
    identity = training_identity(manifest, pretrained, config)
    folder, _ = take_up(open_run, identity, new_run=new_run, when_held=when_held)
    folder = folder or open_run.start()
    with hold_run(folder, when_held=when_held) as lease:
        # Another driver may have decided what is trained, until the run was ours.
        record = folder.record()
        if record is not None:
            refuse_changed_identity(record, identity)
        run = _HeldRun(open_run=open_run, folder=folder, lease=lease, identity=identity, record=record)
        yield NetworkTraining(store, manifest, pretrained, config, progress, run, new_run=new_run)


@dataclass(slots=True, kw_only=True)
class _HeldRun:
    """A run that this driver holds; it has no record before its input is frozen."""

    open_run: OpenRun
    folder: RunFolder
    lease: RunLease
    identity: dict[str, Any]
    record: RunRecord | None


class NetworkTraining:
    """One training job in its run folder, from the frozen input to `_SUCCESS`. `notes` tell how it is done here."""

    def __init__(
        self,
        store: ObjectStore,
        manifest: Manifest,
        pretrained: BackboneRecord,
        config: TrainConfig,
        progress: Progress,
        run: _HeldRun,
        *,
        new_run: bool,
    ) -> None:
        self._store, self._manifest = store, manifest
        self._pretrained, self._config, self._progress = pretrained, config, progress
        self._run, self._new_run = run, new_run
        self.folder, self.identity = run.folder, run.identity
        self.notes: list[str] = []

    def run(self, draw_curves: CurveDrawer) -> TrainedNetwork:
        """Train what an earlier call has not finished, and keep the network.

        `draw_curves` makes the picture of its epochs, which is kept. Raises TrainingError if the loss became no finite
        number, LeaseLost or RunCancelled as soon as the run is not this driver's any more.
        """
        outcome = read_json(self._store, self.folder.key(_TRAINED))
        if self._run.record is None or outcome is None:
            outcome = self._train_network(draw_curves)
        # The driver needs torch only now: to build the trained network and derive its axis.
        from convoy.pipelines.network_building import keep_trained  # noqa: PLC0415

        backbone = keep_trained(
            self._store,
            trained_backbone_config(self._config, len(self._manifest.classes)),
            outcome["weights_key"],
            preset=self._pretrained.preset,
            classes=self._manifest.classes,
        )
        setup = TrainingSetup.model_validate(self._settings["setup"])
        num_train_images = self._settings["train"]["num_rows"]
        num_val_rows = 0 if (val := self._settings["val"]) is None else val["num_rows"]
        # An older Convoy did not count them.
        val_rejects = outcome.get("val_rejects", 0)
        loss_notes: tuple[str, ...] = ()
        if setup.head is not None:
            loss_notes = setup.head.notes_of_loss(outcome.get("val_top1"), num_val_rows - val_rejects)
        return TrainedNetwork(
            backbone=backbone,
            setup=setup,
            num_train_images=num_train_images,
            num_train_rows=num_train_images - sum(outcome["reject_codes"].values()),
            history=tuple(EpochResult.model_validate(one) for one in outcome["history"]),
            reject_codes=dict(Counter(outcome["reject_codes"]) + Counter(self._settings["left_out"])),
            num_val_rows=num_val_rows,
            val_rejects=val_rejects,
            notes=(*setup.plan.notes, *self.notes, *loss_notes),
        )

    def finish(self, network: TrainedNetwork, report: dict[str, Any], draw_curves: CurveDrawer) -> None:
        """Write history, curves and report, end the run, and delete its checkpoints, which nothing reads any more."""
        self._run.lease.confirm()
        LearningCurves(self.folder, draw_curves).write(network.history)
        finish(self.folder, report)
        self._run.open_run.close(self.folder)
        # The training is done, whatever becomes of them: what is left here is removed by `convoy runs gc`.
        with suppress(StorageError):
            self._store.delete(info.key for info in training_leftovers(self.folder))

    @property
    def _settings(self) -> dict[str, Any]:
        return {} if self._run.record is None else self._run.record.settings

    def _train_network(self, draw_curves: CurveDrawer) -> dict[str, Any]:
        self._progress.stage("starting Ray")
        with ray_session():
            options = settle_ingest(self._config.workers, self._manifest)
            workers = plan_workers(options)
            if options.ingest is not self._config.workers.ingest and workers.gpus_per_worker:
                self.notes.append(FUSED_NOTE)
            require_gpu_for_fp16(self._config, on_gpus=workers.gpus_per_worker > 0)
            record = self._run.record = self._run.record or self._freeze(workers)
            setup = TrainingSetup.model_validate(record.settings["setup"])
            if not setup.plan.phases:
                # Only the head was to be trained, and that is done.
                weights_key = record.settings["initial_weights_key"]
                told: dict[str, Any] = {"reject_codes": {}, "val_rejects": 0}
                if setup.head is not None:
                    told = setup.head.model_dump(include=set(told))
                return {"weights_key": weights_key, "history": [], **told}
            spec = self._spec(record, setup, workers)
            if workers.ingest is Ingest.SPLIT:
                workers = self._with_room(workers, spec)
                spec = self._spec(record, setup, workers)
            self._progress.stage("starting the training workers")
            outcome = self._run_workers(spec, workers, LearningCurves(self.folder, draw_curves))
        if (last := outcome["diverged"]) is not None:
            raise TrainingError(
                "the loss or a weight is no finite number any more: the last checkpoint before is kept",
                where=f"{self.folder.prefix}checkpoints/, phase {last['phase']}, epoch {last['epoch']} of"
                f" {last['num_epochs']}, step {last['step']} of {last['num_steps']}",
                next_step="lower learning_rate, set recipe.clip_norm, or train in fp32, and add --new-run",
            )
        return outcome

    def _run_workers(self, spec: TrainingSpec, workers: WorkerPlan, curves: LearningCurves) -> dict[str, Any]:
        """The outcome of the training; where it ends without weights, its curves are written here."""

        def tell(event: TrainingEvent) -> None:
            self._progress.training(event)
            curves.hear(event)

        try:
            outcome = run_training(spec, workers, tell, self._run.lease.check)
        except (ClusterError, TrainingError):
            curves.write_heard()
            raise
        if outcome["diverged"] is not None:
            curves.write_heard()
        return outcome

    def _with_room(self, workers: WorkerPlan, spec: TrainingSpec) -> WorkerPlan:
        """The workers of a split ingest, or, where it is not asked for and batches would not fit, of a fused one."""
        options = self._config.workers.model_copy(update={"num_workers": workers.num_workers})
        batch_bytes = spec.largest_batch_bytes(workers.num_workers)
        fitting = plan_workers(options, batch_bytes=batch_bytes)
        if fitting.ingest is not workers.ingest:
            self.notes.append(
                f"images are prepared by threads of the training workers: Ray's object store is too small for the"
                f" batches of {workers.num_workers * workers.preparers_per_worker} processes"
                f" ({batch_bytes / 2**20:,.0f} MiB each); a larger /dev/shm or object_store_memory would hold them"
            )
            self._progress.stage(self.notes[-1])
        return fitting

    def _freeze(self, workers: WorkerPlan) -> RunRecord:
        """Decide everything once, so that a resumed run trains the very same network."""
        inputs = TrainingInputs(self._store, self._manifest, self._pretrained, self._config)
        rows = read_split(self._manifest, Split.TRAIN, self._config.rows)
        # Before the teacher looks at all of them: what cannot be trained is refused at once.
        planned = plan_on_workers(inputs, rows, workers)
        taught = taught_rows(self._store, self._manifest, self._config, rows, progress=self._progress)
        if taught.rows.num_rows < rows.num_rows:
            planned = plan_on_workers(inputs, taught.rows, workers)
        train = with_mean_weight_one(taught.rows)
        points = None
        if planned.fits_head:
            points = RunHeadPoints(self.folder, self.identity, self._run.lease.check)
        setup, weights = set_up_training(
            inputs,
            planned,
            taught,
            progress=self._progress,
            new_run=self._new_run,
            kept=points,
        )
        # Deciding took minutes.
        self._run.lease.confirm()
        weights_key = self.folder.key("initial.safetensors")
        self._store.put(weights_key, weights)
        watched = validation_rows(self._manifest, self._config.rows)
        val = None if watched is None else self._freeze_rows("val", watched)
        settings = {
            "setup": setup,
            "initial_weights_key": weights_key,
            "train": self._freeze_rows("train", train),
            "val": val,
            "teacher": self._freeze_teacher(taught),
            "class_counts": weigh_classes(train, self._manifest.classes),
            "left_out": taught.reject_codes,
            "draw_version": DRAW_VERSION,
        }
        record = RunRecord.new(
            self.folder.run_id,
            verb=_VERB,
            identity=self.identity,
            config=self._config.model_dump(mode="json"),
            outputs={},
            groups=(),
            settings=json.loads(canonical_json(settings)),
        )
        record = self.folder.write_record(record)
        if points is not None:
            # The head is in the first weights; what is left here goes when the training ends.
            with suppress(StorageError):
                points.remove()
        return record

    def _freeze_rows(self, name: str, rows: pa.Table) -> TrainingRows:
        buffer = io.BytesIO()
        pq.write_table(rows, buffer, compression="zstd")
        key = self.folder.key(f"input/{name}.parquet")
        self._store.put(key, buffer.getvalue())
        return TrainingRows(key=key, num_rows=rows.num_rows)

    def _freeze_teacher(self, taught: TaughtRows) -> TeacherRows | None:
        if taught.teacher_logits_NK is None or self._config.distill is None:
            return None
        key = self.folder.key("input/teacher.parquet")
        ids = taught.rows["sample_id"].to_pylist()
        write_teacher_logits(self._store, key, ids, taught.teacher_logits_NK)
        how = self._config.distill.model_dump(include=set(Distillation.model_fields))
        return TeacherRows(key=key, distillation=Distillation(**how))

    def _spec(self, record: RunRecord, setup: TrainingSetup, workers: WorkerPlan) -> TrainingSpec:
        config, settings = self._config, record.settings
        balance = setup.plan.balance
        return TrainingSpec(
            # A run of an older Convoy has none.
            draw_version=settings.get("draw_version", 1),
            workspace=self._store.root_uri,
            run_id=self.folder.run_id,
            backbone=trained_backbone_config(config, len(self._manifest.classes)),
            initial_weights_key=settings["initial_weights_key"],
            preset=self._pretrained.preset,
            decode_rule=config.extraction.decode,
            augmentation=setup.augmentation,
            recipe=setup.plan.recipe,
            phases=setup.plan.phases,
            class_weights=class_weights(settings["class_counts"]) if balance is Balance.WEIGHTS else None,
            balanced_sampling=balance is Balance.SAMPLING,
            train=settings["train"],
            val=settings["val"],
            teacher=settings["teacher"],
            batch_size=setup.plan.batch_size,
            checkpoint_steps=config.checkpoint_steps,
            checkpoint_minutes=config.checkpoint_minutes,
            ingest=workers.ingest,
            num_preparers=workers.preparers_per_worker,
            num_threads=workers.num_threads,
            num_fetch_threads=config.extraction.num_fetch_threads,
            stall_s=config.extraction.stall_s,
            local_cache=config.local_cache.options,
        )


def require_gpu_for_fp16(config: TrainConfig, *, on_gpus: bool) -> None:
    """ConfigError where fp16 is asked for and the workers have no GPU."""
    if config.recipe.precision is TrainingPrecision.FP16 and not on_gpus:
        raise ConfigError(
            "fp16 needs a GPU, and the workers have none",
            where="recipe.precision",
            next_step="take bf16 or fp32, or auto for what is best here",
        )
