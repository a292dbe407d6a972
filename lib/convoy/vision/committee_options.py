"""How a committee and its gate run, as values. Free of torch."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from itertools import pairwise
from typing import Annotated

from pydantic import Field

from convoy.core.config import StrictModel
from convoy.core.crop_policies import Averaging, CropPlan, CropPolicy, crop_views, view_indices
from convoy.core.errors import ConfigError
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


class GateLook(StrictModel):
    """A look at an image by some members at some crops.

    It is believed where its largest probability is at least `threshold`; no look is above a threshold of 1.
    """

    members: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    policy: CropPolicy
    threshold: float = Field(ge=0)


class GateOptions(GateLook):
    """The first look of a gated committee, and what comes before the whole committee where that is not sure.

    Each further look has the members and the crops of the one before, and more.
    """

    then: tuple[GateLook, ...] = Field(default=(), max_length=2)

    @property
    def looks(self) -> tuple[GateLook, ...]:
        """All looks in order."""
        return (self, *self.then)


class GateStage(StrEnum):
    """Which look gave the output of an image, or that the whole committee did."""

    FIRST_LOOK = "first_look"
    SECOND_LOOK = "second_look"
    THIRD_LOOK = "third_look"
    COMMITTEE = "committee"


def gate_passes(gate: GateOptions, plan: CropPlan, num_members: int) -> dict[GateStage, int]:
    """How often networks run on an image that is final at each stage of the gate, earlier stages included.

    Raises what `gate_costs` raises.
    """
    return gate_costs(gate, plan, [1] * num_members)


def gate_costs(gate: GateOptions, plan: CropPlan, costs_M: Sequence[int]) -> dict[GateStage, int]:
    """What an image that is final at each stage of the gate costs, where a pass of each member costs so much.

    Raises ConfigError where a look is not part of the committee, or not of the look after it.
    """
    looks = [look_views(look, plan, len(costs_M)) for look in gate.looks]
    for (look, views), (later, later_views) in pairwise(zip(gate.looks, looks, strict=True)):
        if not (set(look.members) <= set(later.members) and set(views) <= set(later_views)):
            raise ConfigError(
                "a look leaves out members or crops of the look before",
                where="gate.then",
                next_step="let each look add members or crops, or both",
            )
    stages = list(GateStage)[: len(looks)]
    costs = [
        sum(costs_M[member] for member in look.members) * len(views)
        for look, views in zip(gate.looks, looks, strict=True)
    ]
    return {
        **dict(zip(stages, costs, strict=True)),
        GateStage.COMMITTEE: sum(costs_M) * len(crop_views(plan)),
    }


def look_views(look: GateLook, plan: CropPlan, num_members: int) -> tuple[int, ...]:
    """The places of a look's views among those of a committee's plan.

    Raises ConfigError where the committee has no such members or crops.
    """
    views = view_indices(look.policy, plan)
    if views is None:
        raise ConfigError(
            f"the crops of '{look.policy}' are not among those of '{plan.policy}'",
            where="gate.policy",
            next_step="choose center, or the committee's own policy",
        )
    if len(set(look.members)) < len(look.members) or max(look.members) >= num_members:
        raise ConfigError(
            f"the committee has no such members: {', '.join(map(str, look.members))}",
            where="gate.members",
            next_step=f"choose different ones from 0 to {num_members - 1}",
        )
    return views
