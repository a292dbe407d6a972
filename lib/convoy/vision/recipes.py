"""Default recipes: for training from scratch those of the architectures' papers, for transfer one that is safe.

A recipe of a paper is given for the paper's batch; `scaled_to` adapts its learning rates linearly to another
batch (Goyal et al. 2017, arXiv:1706.02677).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from convoy.vision.training_config import (
    BODY,
    Optimiser,
    OptimiserKind,
    Phase,
    Recipe,
    Schedule,
    ScheduleKind,
    WeightAveraging,
)

# Of new layers under AdamW, whatever the batch: torch's own default. The rates below are SGD's, as are most papers'.
ADAMW_RATE = 1e-3
# Goyal et al. 2017, arXiv:1706.02677: 0.1 for batches of 256, in proportion for others.
SGD_RATE_AT_256 = 0.1

_HEAD_PHASE, _BODY_PHASE, _ONLY_PHASE = "head", "body", "train"


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperRecipe:
    """A published recipe from scratch, and where it stands. `learning_rate` goes with `recipe.batch_size`."""

    source: str
    recipe: Recipe
    learning_rate: float
    epochs: int
    schedule: Schedule

    def scaled_to(self, batch_size: int, epochs: int | None = None) -> Phase:
        """Its one phase, for another batch and number of epochs."""
        return Phase(
            name=_ONLY_PHASE,
            epochs=epochs or self.epochs,
            learning_rate=self.learning_rate * batch_size / self.recipe.batch_size,
            schedule=self.schedule,
        )


_STEPS_OF_THIRDS = Schedule(kind=ScheduleKind.STEP, milestones=(1 / 3, 2 / 3))
_SGD = Optimiser(kind=OptimiserKind.SGD)
# Where no recipe speaks of that kind. AdamW's decay is not part of the gradient that it scales (Loshchilov and Hutter
# 2019, arXiv:1711.05101), so that SGD's would be next to none at its rates: torch's own default.
DEFAULT_OPTIMISERS: Mapping[OptimiserKind, Optimiser] = {
    OptimiserKind.SGD: _SGD,
    OptimiserKind.ADAMW: Optimiser(kind=OptimiserKind.ADAMW, weight_decay=1e-2),
}
_CIFAR_RESNET = PaperRecipe(
    source="He et al. 2015 (arXiv:1512.03385), section 4.2: rate / 10 at 32k and 48k of 64k updates",
    recipe=Recipe(batch_size=128, optimiser=_SGD),
    learning_rate=0.1,
    epochs=182,
    schedule=Schedule(kind=ScheduleKind.STEP, milestones=(0.5, 0.75)),
)

_PAPERS: Sequence[tuple[str, PaperRecipe]] = (
    (
        r"lenet5",
        PaperRecipe(
            source="LeCun et al. 1998, section III.B (20 passes, falling rate), in mini-batches with momentum",
            recipe=Recipe(batch_size=64, optimiser=Optimiser(weight_decay=0.0)),
            learning_rate=0.01,
            epochs=20,
            schedule=Schedule(kind=ScheduleKind.COSINE),
        ),
    ),
    (
        # At the full rate it learns nothing for some epochs. The paper's 400 updates at a tenth of it are a ramp here.
        r"cifar_resnet110",
        replace(
            _CIFAR_RESNET,
            source="He et al. 2015 (arXiv:1512.03385), section 4.2: 400 of 64k updates warm up, rate / 10 at 32k, 48k",
            schedule=_CIFAR_RESNET.schedule.model_copy(update={"warmup": 400 / 64_000}),
        ),
    ),
    (r"cifar_resnet\d+", _CIFAR_RESNET),
    (
        r"(torchvision|timm):(alexnet|vgg\w*|squeezenet\w*)",
        PaperRecipe(
            source="Simonyan and Zisserman 2014 (arXiv:1409.1556), section 3.1; torchvision's reference rate",
            recipe=Recipe(batch_size=256, optimiser=Optimiser(weight_decay=5e-4)),
            learning_rate=0.01,
            epochs=90,
            schedule=_STEPS_OF_THIRDS,
        ),
    ),
    (
        r"(torchvision|timm):(tf_)?(mobilenet|mnasnet|semnasnet|efficientnet|shufflenet)\w*",
        PaperRecipe(
            source="Sandler et al. 2018 (arXiv:1801.04381), section 6.1, with SGD and a cosine",
            recipe=Recipe(
                batch_size=256,
                optimiser=Optimiser(weight_decay=4e-5),
                averaging=WeightAveraging.EMA,
                ema_decay=0.9999,
            ),
            learning_rate=0.045,
            epochs=300,
            schedule=Schedule(kind=ScheduleKind.COSINE, warmup=0.02),
        ),
    ),
    (
        r"(torchvision|timm):(convnext|inception_next)\w*",
        PaperRecipe(
            source="Liu et al. 2022 (arXiv:2201.03545), appendix A.1, but for its augmentation and stochastic depth",
            recipe=Recipe(
                batch_size=4096,
                optimiser=Optimiser(kind=OptimiserKind.ADAMW, weight_decay=0.05),
                label_smoothing=0.1,
                mixup_alpha=0.8,
                cutmix_alpha=1.0,
                averaging=WeightAveraging.EMA,
                ema_decay=0.9999,
            ),
            learning_rate=4e-3,
            epochs=300,
            schedule=Schedule(kind=ScheduleKind.COSINE, warmup=20 / 300),
        ),
    ),
    (
        r"(torchvision|timm):(legacy_)?(googlenet|inception|xception|p?nasnet)\w*",
        PaperRecipe(
            source="Szegedy et al. 2015 (arXiv:1512.00567), section 8, with SGD and a cosine",
            recipe=Recipe(batch_size=256, optimiser=_SGD, label_smoothing=0.1, clip_norm=2.0),
            learning_rate=0.045,
            epochs=100,
            schedule=Schedule(kind=ScheduleKind.COSINE, warmup=0.05),
        ),
    ),
    (
        r".*",
        PaperRecipe(
            source="He et al. 2015 (arXiv:1512.03385), section 3.4: rate / 10 at thirds of 90 epochs",
            recipe=Recipe(batch_size=256, optimiser=_SGD),
            learning_rate=0.1,
            epochs=90,
            schedule=_STEPS_OF_THIRDS,
        ),
    ),
)


def paper_recipe(arch: str) -> PaperRecipe:
    """The recipe of an architecture's family; ResNet's for those that have none of their own."""
    return next(recipe for pattern, recipe in _PAPERS if re.fullmatch(pattern, arch))


def transfer_recipe() -> Recipe:
    """The default for networks whose weights were trained before."""
    return Recipe(batch_size=128, optimiser=_SGD)


def fine_tuning_phases(epochs: int, freeze_depth: int | str) -> tuple[Phase, ...]:
    """First the head alone, then from the freeze depth on at a tenth of the head's rate, falling with the depth.

    A new head sends large random gradients into the body; so the body waits one epoch, and then moves slowly:
    at 0.1 of the head's rate (CS231n's advice for fine-tuning, "a smaller learning rate"), each stage at 0.95
    of the one above it.
    """
    return (
        Phase(
            name=_HEAD_PHASE,
            epochs=1,
            freeze_depth=BODY,
            learning_rate=0.1,
            schedule=Schedule(kind=ScheduleKind.CONSTANT, warmup=0.1),
        ),
        Phase(
            name=_BODY_PHASE,
            epochs=epochs,
            freeze_depth=freeze_depth,
            learning_rate=0.1,
            body_rate=0.1,
            layer_decay=0.95,
            schedule=Schedule(kind=ScheduleKind.COSINE, warmup=0.05),
        ),
    )


def reuse_phases(epochs: int, freeze_depth: int | str) -> tuple[Phase, ...]:
    """One phase: new layers at the full rate, reused ones behind the freeze depth at a tenth of it."""
    return (
        Phase(
            name=_ONLY_PHASE,
            epochs=epochs,
            freeze_depth=freeze_depth,
            learning_rate=0.1,
            body_rate=0.1,
            schedule=Schedule(kind=ScheduleKind.COSINE, warmup=0.05),
        ),
    )
