"""Which members, crops and weights make the ensemble: chosen on validation rows, under a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import inf
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from convoy.core.config import StrictModel
from convoy.core.crop_policies import Averaging, CropPlan, CropPolicy, crop_views, view_indices
from convoy.core.errors import ConfigError
from convoy.core.large_arrays import large_take
from convoy.core.pareto import front_places
from convoy.core.statistics import Interval, wilson_interval
from convoy.vision.ensemble_sets import growing_sets
from convoy.vision.ensembling import (
    Floats,
    Objective,
    fit_member_temperature,
    fit_temperature,
    greedy_selection,
    joint_logits,
    least_nll_weights,
    mean_nll,
    member_values,
    top1,
    uniform_top_k,
)


class SelectionMethod(StrEnum):
    """How members are weighed. See `vision.ensembling`."""

    GREEDY = "greedy"
    TOP_K = "top_k"
    LEAST_NLL = "least_nll"


class EnsembleBudget(StrictModel):
    """What the ensemble may cost when it scores: at least so many images a second, or at most so much money.

    Both are of the whole cluster on which the trials were timed, and `price_per_hour`, which money needs, is that of
    all its machines. They are estimates: each trial predicted validation rows on its share of the cluster, beside
    others, and its rate is scaled up. An image is fetched and decoded once, for all members and crops, which counts as
    if nothing of it were hidden behind the networks.
    """

    min_images_per_s: PositiveFloat | None = None
    max_usd_per_million: PositiveFloat | None = None
    price_per_hour: PositiveFloat | None = None

    @model_validator(mode="after")
    def _money_has_a_price(self) -> Self:
        if self.max_usd_per_million is not None and self.price_per_hour is None:
            raise ValueError("max_usd_per_million needs price_per_hour: what the whole cluster costs an hour")
        return self

    @property
    def max_seconds_per_image(self) -> float:
        """The longest that an image may take; infinite where nothing bounds it."""
        by_rate = inf if self.min_images_per_s is None else 1 / self.min_images_per_s
        if self.max_usd_per_million is None or self.price_per_hour is None:
            return by_rate
        return min(by_rate, self.max_usd_per_million * 3600 / 1e6 / self.price_per_hour)

    def allows(self, seconds_per_image: float) -> bool:
        """Whether an ensemble that takes so long for an image is within the budget."""
        # What costs exactly as much as allowed is allowed, however it was rounded.
        return seconds_per_image <= self.max_seconds_per_image * (1 + 1e-9)

    def usd_per_million(self, seconds_per_image: float) -> float | None:
        """The money for a million images, where the price of an hour is known."""
        return None if self.price_per_hour is None else seconds_per_image * 1e6 / 3600 * self.price_per_hour


class EnsembleSettings(StrictModel):
    """How an ensemble is built of candidates.

    `crops` are the policies to choose from; null: all that the candidates' kept predictions hold. `calibrate` fits a
    temperature for each member, to the mean over the views of each policy, and for the whole. `max_members` bounds the
    size. `gate` asks for the cheap first looks of the mode `gated`, with the share of rows on which it must agree with
    the exact committee, shown on validation rows at a confidence of 90 %; they begin at the centre crop, so only crops
    that hold it are chosen from then.
    """

    method: SelectionMethod = SelectionMethod.GREEDY
    averaging: Averaging = Averaging.PROBABILITIES
    objective: Objective = Objective.NLL
    crops: tuple[CropPolicy, ...] | None = Field(default=None, min_length=1)
    max_members: PositiveInt | None = None
    rounds: PositiveInt = 50
    bags: PositiveInt = 20
    bag_share: float = Field(default=0.5, gt=0, le=1)
    seed: int = Field(default=0, ge=0)
    calibrate: bool = True
    budget: EnsembleBudget = EnsembleBudget()
    gate: float | None = Field(default=None, gt=0.5, le=1)

    def policies(self, plan: CropPlan) -> list[CropPolicy]:
        """The policies to choose from, cheapest first, where predictions keep the views of `plan`.

        Raises ConfigError for a policy whose views are not kept, and for a gate without the centre crop.
        """
        kept = [policy for policy in CropPolicy if view_indices(policy, plan) is not None]
        missing = [policy.value for policy in self.crops or () if policy not in kept]
        if missing:
            raise ConfigError(
                f"the candidates keep no views of {', '.join(missing)}: they hold {', '.join(kept)}",
                where="ensemble.crops",
                next_step="choose among these, or search with other `crops`",
            )
        chosen = [policy for policy in kept if self.crops is None or policy in self.crops]
        if self.gate is None:
            return chosen
        with_centre = [
            policy for policy in chosen if view_indices(CropPolicy.CENTER, CropPlan(policy=policy))
        ]
        if not with_centre:
            raise ConfigError(
                f"a gate begins at the centre crop, which {', '.join(chosen)} has not",
                where="ensemble.gate",
                next_step="leave `gate` out, or keep the crops ten",
            )
        return with_centre


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CandidatePredictions:
    """Outputs of M candidates for the same N labelled validation rows, in the views of `plan`.

    `seconds_per_pass_M` is what one pass through all of the `num_networks_M` of each takes the whole cluster,
    `seconds_once_M` what an image takes it beside all passes.
    """

    logits_MVNK: NDArray[np.float32]
    labels_N: NDArray[np.int32]
    plan: CropPlan
    seconds_per_pass_M: tuple[float, ...]
    seconds_once_M: tuple[float, ...]
    macs_M: tuple[int, ...]
    num_networks_M: tuple[int, ...]


class FrontPoint(StrictModel):
    """Some candidates, by their places, at some crops: what they are worth on validation rows, and what they cost.

    `top1` and `nll`, the latter at the `temperature` of the whole, are of the rows that chose the weights.
    `images_per_s` and `usd_per_million` are estimates, see `EnsembleBudget`. `is_best` marks points that no cheaper one
    equals.
    """

    members: tuple[int, ...]
    weights: tuple[float, ...]
    temperature: float
    crops: CropPolicy
    top1: float
    top1_interval: Interval
    nll: float
    passes_per_image: int
    macs_per_image: int
    images_per_s: float
    usd_per_million: float | None
    is_best: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Choice:
    """The chosen ensemble: places of the candidates, weights of sum 1, temperatures, and all that was compared.

    `best_single` has the highest top-1 of all candidates alone at the chosen crops, the lower NLL among equals.
    """

    point: FrontPoint
    temperatures_M: tuple[float, ...]
    temperature: float
    front: list[FrontPoint]
    best_single: int


class EnsembleChooser:
    """Compares sets of candidates at crop policies on validation rows alone."""

    def __init__(self, candidates: CandidatePredictions, settings: EnsembleSettings) -> None:
        self._candidates, self._settings = candidates, settings
        self._labels_N = candidates.labels_N
        plan, averaging = candidates.plan, settings.averaging
        self._policies = settings.policies(plan)
        self._temperatures: dict[CropPolicy, tuple[float, ...]] = {}
        self._values: dict[CropPolicy, Floats] = {}
        for policy in self._policies:
            views = list(view_indices(policy, plan) or ())
            temperatures_M = tuple(
                fit_member_temperature(logits_VNK[views], self._labels_N, averaging)
                if settings.calibrate
                else 1.0
                for logits_VNK in candidates.logits_MVNK
            )
            self._temperatures[policy] = temperatures_M
            self._values[policy] = member_values(candidates.logits_MVNK, views, averaging, temperatures_M)

    def choose(self) -> Choice:
        """The best point within the budget, by the objective; ConfigError where nothing is cheap enough."""
        points = _marked(self._points())
        affordable = [point for point in points if self._settings.budget.allows(1 / point.images_per_s)]
        if not affordable:
            cheapest = max(points, key=lambda point: point.images_per_s)
            raise ConfigError(
                f"no candidate is within the budget: the cheapest gives {cheapest.images_per_s:.1f} images/s",
                where="ensemble.budget",
                next_step="ask for less speed or allow more money, or search among smaller networks",
            )
        best = min(affordable, key=self._loss)
        singles = [point for point in points if len(point.members) == 1 and point.crops is best.crops]
        return Choice(
            point=best,
            temperatures_M=tuple(self._temperatures[best.crops][member] for member in best.members),
            temperature=best.temperature,
            front=points,
            # The gain over it is one of top-1, whatever the objective.
            best_single=min(singles, key=lambda point: (-point.top1, point.nll)).members[0],
        )

    def temperatures(self, policy: CropPolicy) -> tuple[float, ...]:
        """The temperatures_M of all candidates at a policy, fitted to the mean over its views."""
        return self._temperatures[policy]

    def values(self, policy: CropPolicy) -> Floats:
        """The values_MNK of all candidates at a policy."""
        return self._values[policy]

    def seconds_per_image(self, members: Sequence[int], policy: CropPolicy) -> float:
        """What an image takes the whole cluster with some candidates at a policy, estimated: see `EnsembleBudget`."""
        candidates = self._candidates
        passes = sum(candidates.seconds_per_pass_M[member] for member in members)
        once = max(candidates.seconds_once_M[member] for member in members)
        return once + self._num_views(policy) * passes

    def weigh(self, values_MNK: Floats, labels_N: NDArray[Any]) -> Floats:
        """The weights_M that the method gives to some candidates on some rows."""
        settings = self._settings
        if len(values_MNK) == 1:
            return np.ones(1)
        if settings.method is SelectionMethod.TOP_K:
            return uniform_top_k(values_MNK, labels_N, settings.averaging, objective=settings.objective)
        if settings.method is SelectionMethod.LEAST_NLL:
            return least_nll_weights(values_MNK, labels_N, settings.averaging)
        return greedy_selection(
            values_MNK,
            labels_N,
            settings.averaging,
            objective=settings.objective,
            num_rounds=settings.rounds,
            num_bags=settings.bags,
            bag_share=settings.bag_share,
            seed=settings.seed,
        )

    def _points(self) -> list[FrontPoint]:
        """Every single candidate, and what is best under growing budgets, at every policy."""
        candidates, settings = self._candidates, self._settings
        points: list[FrontPoint] = []
        for policy in self._policies:
            values_MNK, num_views = self._values[policy], self._num_views(policy)
            sets = growing_sets(
                values_MNK,
                self._labels_N,
                settings.averaging,
                costs_M=[num_views * seconds for seconds in candidates.seconds_per_pass_M],
                max_members=settings.max_members,
                budget=settings.budget.max_seconds_per_image - max(candidates.seconds_once_M),
            )
            found = [self._point(members, policy) for members in sets]
            # Different sets may be left with the same members when others get no weight.
            points += {point.members: point for point in found}.values()
        return points

    def _point(self, members: tuple[int, ...], policy: CropPolicy) -> FrontPoint:
        candidates, settings = self._candidates, self._settings
        weights_M = self.weigh(large_take(self._values[policy], members), self._labels_N)
        kept = [(member, float(weight)) for member, weight in zip(members, weights_M, strict=True) if weight]
        chosen, weights = tuple(member for member, _ in kept), tuple(weight for _, weight in kept)
        joint_NK = joint_logits(large_take(self._values[policy], chosen), weights, settings.averaging)
        # A mean of calibrated members is too modest, the more so the more there are: without a temperature of its
        # own a large ensemble would seem worse than it is.
        temperature = fit_temperature(joint_NK, self._labels_N) if settings.calibrate else 1.0
        num_correct = int((joint_NK.argmax(axis=1) == self._labels_N).sum())
        num_views, seconds = self._num_views(policy), self.seconds_per_image(chosen, policy)
        return FrontPoint(
            members=chosen,
            weights=weights,
            temperature=temperature,
            crops=policy,
            top1=top1(joint_NK, self._labels_N),
            top1_interval=wilson_interval(num_correct, len(self._labels_N)),
            nll=mean_nll(joint_NK / temperature, self._labels_N),
            passes_per_image=num_views * sum(candidates.num_networks_M[member] for member in chosen),
            macs_per_image=num_views * sum(candidates.macs_M[member] for member in chosen),
            images_per_s=1 / seconds,
            usd_per_million=settings.budget.usd_per_million(seconds),
        )

    def _num_views(self, policy: CropPolicy) -> int:
        return len(crop_views(CropPlan(policy=policy, multiscale=self._candidates.plan.multiscale)))

    def _loss(self, point: FrontPoint) -> tuple[float, float]:
        if self._settings.objective is Objective.NLL:
            return point.nll, -point.top1
        return -point.top1, point.nll


def _marked(points: Sequence[FrontPoint]) -> list[FrontPoint]:
    """From the cheapest point to the dearest; those are best that beat all cheaper ones in top-1."""
    ordered = sorted(points, key=lambda one: (-one.images_per_s, -one.top1))
    best = front_places([1 / point.images_per_s for point in ordered], [point.top1 for point in ordered])
    return [point.model_copy(update={"is_best": place in best}) for place, point in enumerate(ordered)]
