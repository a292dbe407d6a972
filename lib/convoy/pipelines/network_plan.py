"""What a strategy makes of a backbone: the network to train, its first weights, its phases and recipe."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from enum import StrEnum
from typing import Any

from torch import nn

from convoy.cluster.training_spec import largest_batch_bytes
from convoy.core.config import StrictModel
from convoy.core.epochs import EpochPlan
from convoy.core.errors import ConfigError
from convoy.pipelines.classifiers import Strategy
from convoy.pipelines.network_building import learnt_layers
from convoy.pipelines.train_config import TrainConfig
from convoy.pipelines.training_rows import balance_notes, settle_balance
from convoy.pipelines.wanted_training import default_recipe, stand_in_rate, wanted_phases, wanted_recipe
from convoy.vision.backbone_config import BackboneConfig, WeightSource, weight_source
from convoy.vision.call_trace import run_on_shapes
from convoy.vision.engine_options import NetworkDevice
from convoy.vision.freezing import (
    frozen_stages,
    resolve_freeze_depth,
    trains_batchnorm,
    trains_the_same,
)
from convoy.vision.presets import EvalPreset
from convoy.vision.recipes import paper_recipe
from convoy.vision.stages import DepthAxis
from convoy.vision.training_config import (
    AUTO,
    Balance,
    BatchUnit,
    OptimiserKind,
    Phase,
    Recipe,
    ScheduleKind,
    TrainingPrecision,
    WeightAveraging,
    group_batch_size,
    rate_factor,
)

_NAMES = {OptimiserKind.ADAMW: "AdamW", OptimiserKind.SGD: "SGD"}
# What averages epochs of the last phase; it takes so many at least, where the phase has them.
_OF_EPOCHS = (WeightAveraging.SWA, WeightAveraging.SOUP)
_LEAST_AVERAGED = 2
# Below it the statistics of a batch are a poor guess (Wu and He 2018, arXiv:1803.08494, figure 1).
_FEW_FOR_BATCHNORM = 16
# Of a batch: steps that have less of it are told.
_NEARLY_WHOLE = 0.75
# The keys beside a choice that mean nothing under it.
_UNUSED_UNDER: Mapping[StrEnum, frozenset[str]] = {
    WeightAveraging.LAST: frozenset({"ema_decay", "average_epochs"}),
    WeightAveraging.BEST: frozenset({"ema_decay", "average_epochs"}),
    WeightAveraging.EMA: frozenset({"average_epochs"}),
    WeightAveraging.SWA: frozenset({"ema_decay"}),
    WeightAveraging.SOUP: frozenset({"ema_decay"}),
    BatchUnit.GROUP: frozenset({"rate_scaling"}),
    BatchUnit.WORKER: frozenset(),
    OptimiserKind.SGD: frozenset({"betas"}),
    OptimiserKind.ADAMW: frozenset({"momentum"}),
    ScheduleKind.CONSTANT: frozenset({"milestones", "gamma", "final_factor"}),
    ScheduleKind.COSINE: frozenset({"milestones", "gamma"}),
    ScheduleKind.STEP: frozenset({"final_factor"}),
    ScheduleKind.ONE_CYCLE: frozenset({"warmup", "milestones", "gamma", "final_factor"}),
}


class NetworkPlan(StrictModel):
    """Recipe and phases with every default and every `auto` resolved, and why.

    `batch_size` counts images of one update over all workers. `notes` are for the report.
    """

    recipe: Recipe
    phases: tuple[Phase, ...]
    batch_size: int
    balance: Balance
    notes: tuple[str, ...]


def trained_backbone_config(config: TrainConfig, num_classes: int) -> BackboneConfig:
    """The network that the strategy trains, as a config from which every worker builds it."""
    update: dict[str, Any] = {"num_classes": num_classes, "weights": "trained", "weights_digest": None}
    if config.strategy is Strategy.PARTIAL_REUSE:
        update["new_layers"] = config.reuse
    return config.backbone.model_copy(update=update)


def plan_network(
    config: TrainConfig,
    network: nn.Module,
    axis: DepthAxis,
    counts: Sequence[int],
    *,
    num_workers: int,
    on_gpus: bool,
    device: NetworkDevice | None,
    has_val: bool,
) -> NetworkPlan:
    """Resolve recipe and phases for a network, a dataset with `counts` images a class, and a group of workers.

    `device` is what a worker trains on; where that is not known, a precision of `auto` stays so. `has_val`: whether
    labelled rows watch the training. Raises ConfigError for a freeze depth that is impossible or would keep new layers
    random, a batch that the training rows or workers do not fit, a resolution that the network cannot take, or a
    network that is to be compiled where nothing compiles.
    """
    wanted = wanted_recipe(config)
    phases = wanted_phases(config, wanted)
    recipe = _resolve_recipe(wanted, phases[-1], device)
    batch_size = group_batch_size(recipe, num_workers)
    epoch = EpochPlan(num_rows=sum(counts), batch_size=batch_size)
    _check_batch(epoch, num_workers)
    _check_resolutions(phases, network)
    images_per_class = statistics.median(counts)
    resolved = tuple(
        _resolve_phase(
            phase,
            axis,
            images_per_class=images_per_class,
            # What the first phase does not freeze it trains, so later ones may freeze everything.
            num_learnt=None if number else _num_learnt(config, axis),
            factor=rate_factor(recipe, num_workers),
        )
        for number, phase in enumerate(phases)
    )
    recipe, batchnorm_notes = _settle_batchnorm(
        recipe,
        has_batchnorm=any(trains_batchnorm(network, axis, frozen_stages(phase)) for phase in resolved),
        batch_size=epoch.smallest_batch,
        num_workers=num_workers,
        on_gpus=on_gpus,
    )
    balance = settle_balance(recipe.balance, counts)
    notes = (
        _source(config),
        *_notes(phases, resolved, axis, images_per_class),
        *_notes_of_batch(epoch),
        *batchnorm_notes,
        *_notes_of_random(config, resolved),
        *_notes_of_head_alone(config, resolved, axis),
        *_notes_of_precision(wanted, device),
        *_notes_of_resolution(phases[-1]),
        *balance_notes(balance, counts),
        *_notes_of_average(wanted, recipe, phases[-1]),
        *_notes_of_stand_ins(config, recipe),
        *([] if has_val else _notes_without_val(recipe)),
        *_notes_of_unused(config, wanted),
        *_notes_of_rate(recipe, num_workers),
    )
    return NetworkPlan(recipe=recipe, phases=resolved, batch_size=batch_size, balance=balance, notes=notes)


def planned_batch_bytes(config: TrainConfig, preset: EvalPreset, num_workers: int) -> int:
    """Bytes of the images of the largest batch that one of so many workers gets, before anything else is decided."""
    recipe = wanted_recipe(config)
    batch_size = group_batch_size(recipe, num_workers)
    return largest_batch_bytes(preset, wanted_phases(config, recipe), batch_size, num_workers)


def _resolve_recipe(recipe: Recipe, last: Phase, device: NetworkDevice | None) -> Recipe:
    """The recipe with the precision that is best there, and an average of at most half of the last phase, or two."""
    update: dict[str, Any] = {}
    if recipe.precision is TrainingPrecision.AUTO and device is not None:
        update["precision"] = TrainingPrecision(device.precision.value)
    if recipe.compile and device is not None and device.has_compiler is False:
        raise ConfigError(
            f"the network cannot be compiled: there is no {device.compilers} beside {device.name}",
            where="recipe.compile",
            next_step="install one where the workers run, or leave recipe.compile out",
        )
    if recipe.averaging in _OF_EPOCHS:
        most = max(_LEAST_AVERAGED, last.epochs // 2)
        update["average_epochs"] = min(recipe.average_epochs, most)
    return recipe.model_copy(update=update)


def _resolve_phase(
    phase: Phase, axis: DepthAxis, *, images_per_class: float, num_learnt: int | None, factor: float
) -> Phase:
    """The phase with a number of frozen stages, and its rate for the group of workers."""
    depth = resolve_freeze_depth(
        axis, phase.freeze_depth, images_per_class=images_per_class, num_learnt=num_learnt
    )
    return phase.model_copy(update={"freeze_depth": depth, "learning_rate": phase.learning_rate * factor})


def _settle_batchnorm(
    recipe: Recipe, *, has_batchnorm: bool, batch_size: int, num_workers: int, on_gpus: bool
) -> tuple[Recipe, list[str]]:
    """The recipe with `sync_batchnorm` decided, and over how many images BatchNorm will take its statistics.

    Decided for several workers where there is one as well: a training may go on with more.
    """
    if recipe.sync_batchnorm == AUTO:
        is_synced = has_batchnorm and on_gpus and recipe.batch_unit is BatchUnit.GROUP
        recipe = recipe.model_copy(update={"sync_batchnorm": is_synced})
    if not has_batchnorm:
        return recipe, []
    whose, num_sharing = "", num_workers
    if num_workers > 1 and recipe.sync_batchnorm and on_gpus:
        whose = " of all workers together"
    elif num_workers > 1:
        whose = f" of each worker by itself{'' if on_gpus else ', as only GPUs can share them'}"
        num_sharing = 1
    num_images = max(batch_size * num_sharing // num_workers // recipe.accumulate, 1)
    note = f"BatchNorm takes its statistics over {num_images} images{whose}"
    if num_images < _FEW_FOR_BATCHNORM:
        note += ", which makes them noisy: raise recipe.batch_size, or lower recipe.accumulate or the number of workers"
    return recipe, [note]


def _source(config: TrainConfig) -> str:
    if config.strategy is Strategy.FROM_SCRATCH:
        return f"recipe: {paper_recipe(config.backbone.arch).source}"
    return f"recipe: Convoy's for {config.strategy.value}"


def _num_learnt(config: TrainConfig, axis: DepthAxis) -> int | None:
    """How many leading stages begin with weights that were learnt, or are random by wish; None for all but the last."""
    if config.strategy is Strategy.FROM_SCRATCH:
        return 0
    has_new_layers = (
        config.strategy is Strategy.PARTIAL_REUSE and learnt_layers(config.backbone) != config.reuse
    )
    return axis.num_reused if has_new_layers else None


def _check_batch(epoch: EpochPlan, num_workers: int) -> None:
    if epoch.smallest_batch < num_workers:
        raise ConfigError(
            f"a batch of {epoch.smallest_batch} images leaves some of {num_workers} workers without any",
            where="recipe.batch_size",
            next_step="raise the batch size, or lower workers.num_workers",
        )


def _check_resolutions(phases: Sequence[Phase], network: nn.Module) -> None:
    for phase in phases:
        if phase.resolution_px is None:
            continue
        try:
            run_on_shapes(network, num_images=2, input_px=phase.resolution_px)
        except ConfigError as error:
            raise ConfigError(
                error.what,
                where=f"phases.{phase.name}.resolution_px",
                next_step="choose a size that the network can take, or leave it out for that of its preset",
            ) from error


def _notes(
    phases: Sequence[Phase], resolved: Sequence[Phase], axis: DepthAxis, images_per_class: float
) -> list[str]:
    notes = []
    for wanted, phase in zip(phases, resolved, strict=True):
        depth = int(phase.freeze_depth)
        frozen = f"nothing frozen of {len(axis)} stages"
        if depth:
            frozen = f"{depth} of {len(axis)} stages frozen, up to {axis[depth - 1].name}"
        why = f", by {images_per_class:g} images a class" if wanted.freeze_depth == "auto" else ""
        notes.append(f"phase {phase.name}: {phase.epochs} epochs, {frozen}{why}")
    return notes


def _notes_of_batch(epoch: EpochPlan) -> list[str]:
    """Where an epoch of few images is cut into steps of equal size that are clearly smaller than its batch."""
    if epoch.smallest_batch > _NEARLY_WHOLE * epoch.batch_size:
        return []
    return [
        f"{epoch.num_rows} images are {epoch.num_steps} steps of about {epoch.smallest_batch}, as steps are of equal"
        f" size: rates are those for batches of {epoch.batch_size}"
    ]


def _notes_of_stand_ins(config: TrainConfig, recipe: Recipe) -> list[str]:
    """What an optimiser of another kind than the default's has in place of that one's values."""
    kind, usual = recipe.optimiser.kind, default_recipe(config).optimiser.kind
    values = []
    if (rate := stand_in_rate(config, recipe)) is not None:
        values.append(f"learning rate {rate:g}")
    if kind is not usual and "weight_decay" not in config.recipe.optimiser.model_fields_set:
        values.append(f"weight decay {recipe.optimiser.weight_decay:g}")
    why = f"for {_NAMES[kind]}: none is given, and the default would be {_NAMES[usual]}'s"
    return [f"{value}, {why}" for value in values]


def _notes_of_random(config: TrainConfig, resolved: Sequence[Phase]) -> list[str]:
    """What is frozen from the first phase to the last of a network whose weights are random, such as a control's."""
    depth = min(frozen_stages(phase) for phase in resolved)
    if not depth or weight_source(config.backbone) is not WeightSource.RANDOM:
        return []
    return [
        f"{depth} stages keep random weights to the end: backbone.weights is random, and no phase trains them"
    ]


def _notes_of_head_alone(config: TrainConfig, resolved: Sequence[Phase], axis: DepthAxis) -> list[str]:
    """Where the second of Convoy's own phases of a fine-tuning trains no more than the first."""
    is_own = config.strategy is Strategy.FINE_TUNE and config.phases is None
    if not is_own or not trains_the_same(axis, *map(frozen_stages, resolved)):
        return []
    return [
        f"phase {resolved[-1].name} trains the head alone, as phase {resolved[0].name} does: a lower freeze_depth"
        f" trains more, {Strategy.LINEAR_PROBE.value} ends sooner"
    ]


def _notes_of_precision(wanted: Recipe, device: NetworkDevice | None) -> list[str]:
    if wanted.precision is not TrainingPrecision.AUTO:
        return []
    unknown = "precision auto: the training itself asks a worker of the cluster"
    return [unknown if device is None else device.precision_note]


def _notes_of_resolution(last: Phase) -> list[str]:
    if last.resolution_px is None:
        return []
    return [
        f"the last phase learns and is judged at {last.resolution_px} pixels; its bundle sees those of the preset"
    ]


def _notes_of_average(wanted: Recipe, recipe: Recipe, last: Phase) -> list[str]:
    """Where fewer epochs are averaged than the recipe wants."""
    taken = min(recipe.average_epochs, last.epochs)
    if recipe.averaging not in _OF_EPOCHS or taken >= wanted.average_epochs:
        return []
    of = f"{taken} of the {last.epochs} epochs of phase {last.name}"
    return [f"{recipe.averaging.value} takes {of}: at most half, or two"]


def _notes_of_rate(recipe: Recipe, num_workers: int) -> list[str]:
    factor = rate_factor(recipe, num_workers)
    if factor == 1.0:
        return []
    return [f"learning rates times {factor:g} for {num_workers} workers ({recipe.rate_scaling.value})"]


def _notes_without_val(recipe: Recipe) -> list[str]:
    """What of a recipe does not mean what it says where nothing is measured after an epoch."""
    why, notes = "no labelled rows watch the training", []
    if recipe.patience_epochs is not None:
        notes.append(f"patience_epochs has no effect: {why}, so every phase takes all of its epochs")
    if recipe.averaging in (WeightAveraging.BEST, WeightAveraging.SOUP):
        notes.append(f"averaging {recipe.averaging.value} goes by the training loss, as {why}")
    return notes


def _notes_of_unused(config: TrainConfig, wanted: Recipe) -> list[str]:
    """What is set of the recipe or of the schedule of a phase, and means nothing beside the rest of it."""
    given, of_optimiser = config.recipe.model_fields_set, config.recipe.optimiser.model_fields_set
    unused = [
        *_unused_under("recipe", "averaging", wanted.averaging, given),
        *_unused_under("recipe", "batch_unit", wanted.batch_unit, given),
        *_unused_under("recipe.optimiser", "kind", wanted.optimiser.kind, of_optimiser),
    ]
    for phase in config.phases or ():
        # Unlike a recipe, a schedule that was written out and read back sets all of its keys.
        changed = phase.schedule.model_dump(exclude_defaults=True)
        unused += _unused_under(f"phases.{phase.name}.schedule", "kind", phase.schedule.kind, changed)
    return [f"without effect: {', '.join(unused)}"] if unused else []


def _unused_under(where: str, name: str, choice: StrEnum, given: Collection[str]) -> list[str]:
    unused = _UNUSED_UNDER[choice].intersection(given)
    return [f"{where}.{key} ({name}: {choice.value})" for key in sorted(unused)]
