"""What is looked for inside a network, and how, as values. Free of torch."""

from __future__ import annotations

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from convoy.core.config import StrictModel


class Unit(StrictModel):
    """What an image is made for: channel `index` of a stage, or where that is None of the logits."""

    index: NonNegativeInt
    stage: str | None = None


class MaximisationOptions(StrictModel):
    """How an image is made that a unit likes: gradient ascent by Adam in `steps` steps.

    `jitter` is the share of the side by which the image is shifted at most before each step, `total_variation` the
    weight of the mean absolute difference between neighbouring pixels against the activation, both in their own
    deviation; `frequency_decay` is the power of the frequency by which the spectrum's coefficients are scaled down.
    """

    steps: PositiveInt = 192
    learning_rate: PositiveFloat = 0.05
    jitter: float = Field(default=1 / 16, ge=0, lt=0.5)
    total_variation: NonNegativeFloat = 0.5
    frequency_decay: NonNegativeFloat = 1.0
    seed: NonNegativeInt = 0
