"""The recipe and the phases that a config asks for, before network, device and workers are known."""

from __future__ import annotations

from typing import Any

from convoy.core.config import StrictModel
from convoy.pipelines.classifiers import Strategy
from convoy.pipelines.train_config import TrainConfig
from convoy.vision.recipes import (
    ADAMW_RATE,
    DEFAULT_OPTIMISERS,
    SGD_RATE_AT_256,
    fine_tuning_phases,
    paper_recipe,
    reuse_phases,
    transfer_recipe,
)
from convoy.vision.training_config import OptimiserKind, Phase, Recipe

_FINE_TUNING_EPOCHS = 5
_REUSE_EPOCHS = 10


def wanted_recipe(config: TrainConfig) -> Recipe:
    """The recipe of the strategy, or of the architecture's paper, with what the config sets in its place."""
    default = default_recipe(config)
    given, optimiser = _what_is_set(config.recipe), _what_is_set(config.recipe.optimiser)
    kind = optimiser.get("kind", default.optimiser.kind)
    # The weight decay of one kind of optimiser means nothing to another.
    usual = default.optimiser if kind is default.optimiser.kind else DEFAULT_OPTIMISERS[kind]
    given["optimiser"] = usual.model_copy(update=optimiser)
    return default.model_copy(update=given)


def default_recipe(config: TrainConfig) -> Recipe:
    """The recipe of the strategy, or of the architecture's paper."""
    if config.strategy is Strategy.FROM_SCRATCH:
        return paper_recipe(config.backbone.arch).recipe
    return transfer_recipe()


def wanted_phases(config: TrainConfig, recipe: Recipe) -> tuple[Phase, ...]:
    """The phases of the config, or else those of the strategy or the paper, at its rate or the optimiser's.

    Freeze depths are as they were asked for, by number or by name.
    """
    if config.phases is not None:
        return config.phases
    depth = config.wanted_freeze_depth
    if config.strategy is Strategy.FINE_TUNE:
        phases = fine_tuning_phases(config.epochs or _FINE_TUNING_EPOCHS, depth)
    elif config.strategy is Strategy.PARTIAL_REUSE:
        phases = reuse_phases(config.epochs or _REUSE_EPOCHS, depth)
    else:
        phase = paper_recipe(config.backbone.arch).scaled_to(recipe.batch_size, config.epochs)
        phases = (phase.model_copy(update={"freeze_depth": depth}),)
    stand_in = stand_in_rate(config, recipe)
    rate = config.learning_rate if stand_in is None else stand_in
    if rate is None:
        return phases
    return tuple(phase.model_copy(update={"learning_rate": rate}) for phase in phases)


def stand_in_rate(config: TrainConfig, recipe: Recipe) -> float | None:
    """The rate of an optimiser that stands in for one of another kind, or None where one is given or it is no other.

    SGD's rate would wreck the weights under AdamW, and by AdamW's SGD learns next to nothing.
    """
    is_given = config.phases is not None or config.learning_rate is not None
    kind, usual = recipe.optimiser.kind, default_recipe(config).optimiser.kind
    if is_given or kind is usual:
        return None
    return ADAMW_RATE if kind is OptimiserKind.ADAMW else SGD_RATE_AT_256 * recipe.batch_size / 256


def _what_is_set(model: StrictModel) -> dict[str, Any]:
    return {name: getattr(model, name) for name in model.model_fields_set}
