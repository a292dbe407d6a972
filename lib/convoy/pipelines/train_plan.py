"""`convoy train --dry-run`: what a training would do, without starting a worker."""

from __future__ import annotations

from pydantic import Field

from convoy.cluster.network_device import known_device
from convoy.core.config import StrictModel
from convoy.core.epochs import EpochPlan
from convoy.core.records import Split
from convoy.pipelines.classifiers import Strategy
from convoy.pipelines.distillation import with_begun_teacher, with_pinned_teacher
from convoy.pipelines.models import fetch_backbone
from convoy.pipelines.network_training import open_training, require_gpu_for_fp16, training_identity
from convoy.pipelines.probing import TrainingInputs, check_head
from convoy.pipelines.train import first_network, measured_on, training_dataset
from convoy.pipelines.train_as_is import as_is_for
from convoy.pipelines.train_config import NETWORKS, PROBES, TrainConfig
from convoy.pipelines.training_rows import balance_notes, count_classes, read_split, row_notes
from convoy.pipelines.workspace import open_workspace
from convoy.storage.bundles import check_bundle_name
from convoy.storage.manifests import MANIFEST_SCHEMA, Manifest
from convoy.storage.object_store import ObjectStore
from convoy.storage.runs import refuse_changed_identity
from convoy.vision.factories import with_pinned_code
from convoy.vision.training_config import Phase, Recipe


class StageSummary(StrictModel):
    """One stage of the depth axis; `frozen_in` are the phases in which it is frozen."""

    depth: int
    stage: str
    channels: int
    num_parameters: int
    frozen_in: list[str]


class TrainPlan(StrictModel):
    """The resolved config and what it would do. `num_steps` are updates over all phases and workers together.

    A network that is used as it is learns from no row.
    """

    config: TrainConfig
    num_train_rows: int
    images_by_class: dict[str, int]
    unfinished_run: str | None
    recipe: Recipe | None = None
    phases: list[Phase] = Field(default_factory=list)
    num_steps: int = 0
    stages: list[StageSummary] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)


def plan_train(config: TrainConfig, *, new_run: bool = False) -> TrainPlan:
    """What `run_train` would do; only the backbone is brought into the workspace if it is not there.

    Without a number of workers in the config, rates and batches are those of one worker. Raises what the job
    itself would raise before it starts any.
    """
    check_bundle_name(config.name)
    store = open_workspace(config.workspace, config.writers)
    manifest, version_notes = training_dataset(store, config)
    config = config.model_copy(update={"backbone": with_pinned_code(config.backbone)})
    config, teacher_notes = with_begun_teacher(config, open_training(store, config.name))
    config = with_pinned_teacher(store, manifest, config)
    learns = config.strategy is not Strategy.AS_IS
    rows = read_split(manifest, Split.TRAIN, config.rows) if learns else MANIFEST_SCHEMA.empty_table()
    counts = count_classes(rows, manifest.classes) if learns else []
    measured_on(manifest, config)
    folder = open_training(store, config.name).unfinished()
    plan = TrainPlan(
        config=config,
        num_train_rows=rows.num_rows,
        images_by_class=dict(zip(manifest.classes, counts, strict=True)) if learns else {},
        unfinished_run=folder.run_id if folder else None,
        notes=[
            *version_notes,
            *teacher_notes,
            *config.unused_keys_notes,
            *(row_notes(manifest, config.rows) if learns else ()),
            # A network's plan has its own.
            *(balance_notes(config.recipe.balance, counts) if config.strategy in PROBES else ()),
        ],
    )
    if config.strategy not in NETWORKS:
        _check_frozen(store, manifest, config)
        return plan
    from convoy.pipelines.network_setup import plan_training, without_head_phase  # noqa: PLC0415

    pretrained = fetch_backbone(store, first_network(config, manifest))
    if folder is not None and not new_run and (begun := folder.record()) is not None:
        refuse_changed_identity(begun, training_identity(manifest, pretrained, config))
    device = known_device()
    # A cluster without any is rare, and the training itself knows.
    on_gpus = device is None or device.is_gpu
    require_gpu_for_fp16(config, on_gpus=on_gpus)
    planned = plan_training(
        TrainingInputs(store, manifest, pretrained, config),
        counts,
        num_workers=config.workers.num_workers or 1,
        on_gpus=on_gpus,
        device=device,
    )
    network = without_head_phase(planned.plan) if planned.fits_head else planned.plan
    steps_an_epoch = EpochPlan(num_rows=rows.num_rows, batch_size=network.batch_size).num_steps
    stages = [
        StageSummary(
            depth=stage.index,
            stage=stage.name,
            channels=stage.channels,
            num_parameters=stage.num_parameters,
            frozen_in=[phase.name for phase in network.phases if stage.index < int(phase.freeze_depth)],
        )
        for stage in planned.new.axis
    ]
    return plan.model_copy(
        update={
            "recipe": network.recipe,
            "phases": list(network.phases),
            "num_steps": steps_an_epoch * sum(phase.epochs for phase in network.phases),
            "stages": stages,
            "notes": [*plan.notes, *network.notes],
        }
    )


def _check_frozen(store: ObjectStore, manifest: Manifest, config: TrainConfig) -> None:
    """Raise what a job without a training of networks would of its backbone, tap and classes."""
    if config.strategy in PROBES:
        check_head(manifest, config)
        fetch_backbone(store, config.backbone).resolve_tap(config.wanted_tap)
        return
    as_is_for(manifest, config, fetch_backbone(store, config.backbone))
