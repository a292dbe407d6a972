"""How a committee and its gate run, as values. Free of torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from convoy.core.config import StrictModel
from convoy.core.crop_policies import Averaging, CropPlan, CropPolicy
from convoy.vision.engine_options import Precision
from convoy.vision.presets import EvalPreset


class MemberOptions(StrictModel):
    """How one network takes part: what it expects of images, its weight, and what divides its logits."""

    preset: EvalPreset
    precision: Precision
    weight: float = Field(gt=0)
    temperature: float = Field(default=1.0, gt=0)


class CommitteeOptions(StrictModel):
    """How a committee runs.

    `batch_size` counts images; it is fixed, and every network pass takes as many. `temperature` divides the joint
    logits. Members that do not fit into `max_resident_bytes` together take turns on the device (null: all stay).
    """

    batch_size: int = Field(gt=0)
    compiled: bool
    num_threads: int = Field(gt=0)
    plan: CropPlan = CropPlan()
    averaging: Averaging = Averaging.PROBABILITIES
    temperature: float = Field(default=1.0, gt=0)
    max_resident_bytes: int | None = Field(default=None, gt=0)


class GateOptions(StrictModel):
    """The first look of a gated committee: which members, at which crops, and when it is believed.

    An image is final where the largest probability of the first look is at least `threshold`; a threshold above 1
    sends every image to the whole committee.
    """

    members: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    policy: CropPolicy
    threshold: float = Field(ge=0)
