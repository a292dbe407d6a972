"""How a network is trained, as values: phases, optimiser, schedule, loss, averaging. Free of torch."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Annotated, Any, Final, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PlainSerializer,
    PositiveFloat,
    PositiveInt,
    SerializationInfo,
    model_validator,
)

from convoy.core.config import StrictModel

# Words for a freeze depth: as many frozen stages as the number of images suggests, and all but the head.
AUTO: Final = "auto"
BODY = "body"


class OptimiserKind(StrEnum):
    """The families of optimisers."""

    SGD = "sgd"  # with Nesterov momentum
    ADAMW = "adamw"


# How much of a running mean stays after an update.
_Decay = Annotated[float, Field(ge=0, lt=1)]


class Optimiser(StrictModel):
    """`momentum` belongs to SGD, `betas` to AdamW. Norms and biases have no weight decay.

    The default decay is SGD's: a training that takes AdamW in place of it without one has 0.01.
    """

    kind: OptimiserKind = OptimiserKind.SGD
    momentum: _Decay = 0.9
    betas: tuple[_Decay, _Decay] = (0.9, 0.999)
    weight_decay: NonNegativeFloat = 1e-4


class ScheduleKind(StrEnum):
    """How the learning rate runs over a phase."""

    CONSTANT = "constant"
    COSINE = "cosine"  # Loshchilov and Hutter 2017 (arXiv:1608.03983), one cycle without restarts
    STEP = "step"  # times `gamma` at each milestone
    ONE_CYCLE = "one_cycle"  # Smith and Topin 2018 (arXiv:1708.07120), both halves a cosine


class Schedule(StrictModel):
    """`warmup` and `milestones` are shares of the phase: epoch 30 of 90 is 1/3.

    The rate rises linearly from nearly 0 in the warm-up. `final_factor` is what a cosine ends at, as a share of the
    highest rate.
    """

    kind: ScheduleKind = ScheduleKind.COSINE
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.0
    milestones: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.5, 0.75)
    gamma: PositiveFloat = 0.1
    final_factor: Annotated[float, Field(ge=0, le=1)] = 0.0


class RateScaling(StrEnum):
    """How the learning rate follows the number of workers, where each brings a batch of its own."""

    NONE = "none"
    LINEAR = "linear"  # Goyal et al. 2017 (arXiv:1706.02677)
    SQRT = "sqrt"  # Krizhevsky 2014 (arXiv:1404.5997)


class BatchUnit(StrEnum):
    """Whose batch `batch_size` is: that of all workers together (so learning rates stay), or of each worker."""

    GROUP = "group"
    WORKER = "worker"


class Balance(StrEnum):
    """What is done about classes of different size.

    `weights`: each row counts inversely to the size of its class. `sampling`: every class is drawn equally
    often, so rows of rare classes repeat within an epoch. `auto`: weights where the largest class has at least
    three times the images of the smallest, else none. Under a head that is fitted from the cache sampling is weights.
    """

    NONE = "none"
    WEIGHTS = "weights"
    SAMPLING = "sampling"
    AUTO = "auto"


class WeightAveraging(StrEnum):
    """Which weights are kept in the end.

    `last`; `best`: the epoch with the highest validation top-1, of those at the last phase's resolution; `ema`:
    exponential moving average over steps; `swa`: mean over the ends of the last epochs (Izmailov et al. 2018,
    arXiv:1803.05407); `soup`: mean of the best epochs (the uniform soup of Wortsman et al. 2022, arXiv:2203.05482,
    over one trajectory), both of the last phase.
    BatchNorm statistics of `swa` and `soup` are measured anew.
    """

    LAST = "last"
    BEST = "best"
    EMA = "ema"
    SWA = "swa"
    SOUP = "soup"


class TrainingPrecision(StrEnum):
    """What the network trains in. Weights and their updates are float32 always; `auto` is bf16 where it is native."""

    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"  # with loss scaling, on GPUs only


class Phase(StrictModel):
    """Some epochs with one set of trainable stages.

    `freeze_depth`: how many leading stages stay frozen: a number (0: everything trains), the name of the last
    frozen stage, "body" (only the head trains, or the new layers), or "auto" by the number of images a class. Stages
    that begin with random weights can be frozen once a phase before has trained them.
    `learning_rate` is the head's and that of new layers; the body has `body_rate` times that, and with `layer_decay`
    each of its stages has `layer_decay` times the rate of the stage above it. `resolution_px` trains on smaller or
    larger images.
    """

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    epochs: PositiveInt
    freeze_depth: int | str = 0
    learning_rate: PositiveFloat
    body_rate: Annotated[float, Field(gt=0, le=1)] = 1.0
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    schedule: Schedule = Schedule()
    resolution_px: PositiveInt | None = None


class Recipe(StrictModel):
    """Everything about optimisation that is the same in all phases.

    `batch_size` counts images of one update; `accumulate` splits each worker's share into that many passes.
    `clip_norm` bounds the norm of the gradient. `mixup_alpha` and `cutmix_alpha` are the parameters of their
    Beta distributions (Zhang et al. 2018, arXiv:1710.09412; Yun et al. 2019, arXiv:1905.04899), 0 is off; with
    both on, each batch gets one of them. `patience_epochs` stops a phase whose validation top-1 does not rise.
    `average_epochs` is how many epochs of the last phase `swa` and `soup` take: at most half of those that are
    planned, or two, as its early epochs are far from its end. `sync_batchnorm` lets BatchNorm take its statistics
    over the passes of all workers, which GPUs can; `auto` does so where the batch is that of all workers.
    """

    batch_size: PositiveInt = 128
    batch_unit: BatchUnit = BatchUnit.GROUP
    rate_scaling: RateScaling = RateScaling.LINEAR
    accumulate: PositiveInt = 1
    optimiser: Optimiser = Optimiser()
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    balance: Balance = Balance.NONE
    mixup_alpha: NonNegativeFloat = 0.0
    cutmix_alpha: NonNegativeFloat = 0.0
    clip_norm: PositiveFloat | None = None
    averaging: WeightAveraging = WeightAveraging.LAST
    ema_decay: Annotated[float, Field(gt=0, lt=1)] = 0.999
    average_epochs: PositiveInt = 5
    patience_epochs: PositiveInt | None = None
    precision: TrainingPrecision = TrainingPrecision.AUTO
    compile: bool = False
    sync_batchnorm: bool | Literal["auto"] = AUTO
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _averages_have_epochs(self) -> Recipe:
        if self.averaging is WeightAveraging.SOUP and self.average_epochs < 2:
            raise ValueError("a soup needs average_epochs of 2 or more")
        if self.averaging is WeightAveraging.SWA and self.patience_epochs is not None:
            raise ValueError(
                "swa averages the last of all epochs, which patience_epochs may cut off:"
                " leave that out, or choose averaging: best, soup or ema"
            )
        return self


def _what_was_set(recipe: Recipe, info: SerializationInfo) -> dict[str, Any]:
    return recipe.model_dump(mode=info.mode, exclude_unset=True)


# What a config sets of a recipe, in place of a default that may be a paper's: written out, it says no more than that.
RecipeChanges = Annotated[Recipe, PlainSerializer(_what_was_set)]


class Distillation(StrictModel):
    """How a student learns from the soft targets of a teacher (Hinton et al. 2015, arXiv:1503.02531, section 2).

    The loss of an image is `weight` * T^2 * KL(teacher || student), both softened by the `temperature` T, plus
    (1 - `weight`) * the loss against its label. Class weights and label smoothing belong to the labels; only a head
    that is fitted from the cache weighs both parts by class. Mixup and cutmix mix both kinds of targets by the same
    shares.
    """

    temperature: PositiveFloat = 4.0
    weight: Annotated[float, Field(gt=0, le=1)] = 0.9


def rate_factor(recipe: Recipe, num_workers: int) -> float:
    """By how much learning rates are multiplied; 1 where the batch of the whole group is fixed."""
    if recipe.batch_unit is BatchUnit.GROUP:
        return 1.0
    return {
        RateScaling.NONE: 1.0,
        RateScaling.LINEAR: float(num_workers),
        RateScaling.SQRT: math.sqrt(num_workers),
    }[recipe.rate_scaling]


def group_batch_size(recipe: Recipe, num_workers: int) -> int:
    """Images of one update over all workers."""
    return recipe.batch_size * (num_workers if recipe.batch_unit is BatchUnit.WORKER else 1)
