"""Accuracy against cost: which backbones pay, and by what the others are beaten.

The form is that of Canziani, Paszke and Culurciello 2016 (arXiv:1605.07678), on the user's own images and machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from convoy.core.config import StrictModel
from convoy.core.errors import DataError
from convoy.core.pareto import dominators, front_places
from convoy.core.statistics import (
    Interval,
    bootstrap_difference,
    effective_counts,
    paired_rate_difference,
    wilson_interval,
)
from convoy.pipelines.backbone_costs import BackboneCost


class CostAxis(StrEnum):
    """What is paid; less is better in all of them."""

    THROUGHPUT = "throughput"
    LATENCY = "latency"
    MEMORY = "memory"
    MONEY = "money"


class Dominance(StrictModel):
    """The backbone that is better and costs no more: the most accurate of those.

    `top1_difference` is its top-1 less that of the dominated one, on the same rows; `cost_ratio` is how many times as
    much the dominated one costs.
    """

    backbone: str
    top1_difference: Interval
    cost_ratio: float


class FrontChoice(StrictModel):
    """One backbone on one axis of cost.

    `is_best` marks those that no cheaper one equals. `gain` is the top-1 that such a one has more than the next cheaper
    of them, on the same rows; None for the cheapest. `explanation` says in words why one takes it or leaves it.
    """

    backbone: str
    cost: float
    top1: Interval
    num_parameters: int
    is_best: bool
    gain: Interval | None
    dominated_by: Dominance | None
    explanation: str


class CostFront(StrictModel):
    """All backbones on one axis, from the cheapest to the dearest, all judged on the same `num_rows` rows.

    Costs are those of whole networks, also where what was judged is a probe at an earlier stage. `unit` says in words
    what they are of: the whole way from the store where images were timed, else the network alone.
    """

    axis: CostAxis
    unit: str
    num_rows: int
    choices: list[FrontChoice]


_UNITS = {
    CostAxis.THROUGHPUT: "milliseconds an image {way}, all workers together",
    CostAxis.LATENCY: "milliseconds for one image through the network, median",
    CostAxis.MEMORY: "MiB for weights and a batch",
    CostAxis.MONEY: "price of a million images {way}",
}
# Costs that follow from the rate of batches, whose spread was measured.
_BY_RATE = (CostAxis.THROUGHPUT, CostAxis.MONEY)
# Two runs on one machine differ by so much at least.
_LEAST_SPREAD = 1.05
_COST_OF: Mapping[CostAxis, Callable[[BackboneCost], float | None]] = {
    CostAxis.THROUGHPUT: lambda cost: 1000 / cost.images_per_s,
    CostAxis.LATENCY: lambda cost: cost.latency_p50_ms,
    CostAxis.MEMORY: lambda cost: None if cost.peak_memory_bytes is None else cost.peak_memory_bytes / 2**20,
    CostAxis.MONEY: lambda cost: cost.usd_per_million,
}


def cost_fronts(
    costs: Sequence[BackboneCost],
    names: Sequence[str],
    correct_MN: NDArray[np.bool_],
    weights_N: NDArray[np.float64] | None = None,
) -> list[CostFront]:
    """A front for each axis on which all backbones have a cost.

    `correct_MN` says of each backbone whether it was right about each of the same rows, `weights_N` how much these
    count. Raises DataError where costs, names and rows do not fit together or there is no row.
    """
    if not len(costs) == len(names) == len(correct_MN) or not correct_MN.size:
        raise DataError(
            "every backbone needs a cost, a name and the same rows, at least one",
            where=f"{len(costs)} costs, {len(names)} names, rows {correct_MN.shape}",
        )
    if weights_N is None:
        weights_N = np.ones(correct_MN.shape[1])
    fronts = []
    for axis, cost_of in _COST_OF.items():
        known = [amount for cost in costs if (amount := cost_of(cost)) is not None]
        if len(known) == len(costs):
            fronts.append(_front(axis, known, costs, names, correct_MN, weights_N))
    return fronts


def _front(
    axis: CostAxis,
    amounts: Sequence[float],
    costs: Sequence[BackboneCost],
    names: Sequence[str],
    correct_MN: NDArray[np.bool_],
    weights_N: NDArray[np.float64],
) -> CostFront:
    def difference(first: int, second: int) -> Interval:
        return _difference(correct_MN[first], correct_MN[second], weights_N)

    top1_M = np.average(correct_MN, axis=1, weights=weights_N).tolist()
    front, beaten_by = front_places(amounts, top1_M), dominators(amounts, top1_M)
    choices = []
    for place in sorted(range(len(names)), key=lambda one: (amounts[one], -top1_M[one])):
        better = beaten_by[place]
        dominance, gain, spread = None, None, _LEAST_SPREAD
        if better is not None:
            dominance = _dominance(place, better, amounts, names, difference(better, place))
            spread = _spread(axis, costs[better], costs[place])
        if place in front[1:]:
            gain = difference(place, front[front.index(place) - 1])
        choices.append(
            FrontChoice(
                backbone=names[place],
                cost=amounts[place],
                top1=wilson_interval(*effective_counts(correct_MN[place], weights_N)),
                num_parameters=costs[place].num_parameters,
                is_best=dominance is None,
                gain=gain,
                dominated_by=dominance,
                explanation=_explain(dominance, gain, spread),
            )
        )
    way = "from the store to features" if all(cost.from_store for cost in costs) else "in the network alone"
    return CostFront(
        axis=axis, unit=_UNITS[axis].format(way=way), num_rows=correct_MN.shape[1], choices=choices
    )


def _difference(
    first_N: NDArray[np.bool_], second_N: NDArray[np.bool_], weights_N: NDArray[np.float64]
) -> Interval:
    """How much higher the top-1 of the first is. Of equal weights few rows show little, also where they all agree."""
    if np.ptp(weights_N) == 0:
        return paired_rate_difference(first_N, second_N)
    # The mean of what rows are worth is the weighted top-1.
    worth_N = weights_N / weights_N.mean()
    return bootstrap_difference(first_N * worth_N, second_N * worth_N)


def _dominance(
    place: int, better: int, amounts: Sequence[float], names: Sequence[str], top1_difference: Interval
) -> Dominance:
    # Two that cost nothing cost alike.
    ratio = amounts[place] / amounts[better] if amounts[better] else 1.0
    return Dominance(
        backbone=names[better],
        top1_difference=top1_difference,
        cost_ratio=ratio,
    )


def _spread(axis: CostAxis, cheaper: BackboneCost, dearer: BackboneCost) -> float:
    """Up to how many times as much the dearer one may cost by chance: at one's slow, or the other's fast batches."""
    if axis not in _BY_RATE:
        return _LEAST_SPREAD
    slow = cheaper.network_images_per_s / cheaper.slow_network_images_per_s
    fast = dearer.fast_network_images_per_s / dearer.network_images_per_s
    return max(slow, fast, _LEAST_SPREAD)


def _explain(dominance: Dominance | None, gain: Interval | None, spread: float) -> str:
    """Why one takes a backbone or leaves it; costs whose ratio is within the `spread` are about the same."""
    if dominance is not None:
        difference = dominance.top1_difference
        better = (
            f"{100 * difference.estimate:.2f} points more accurate" if difference.estimate else "as accurate"
        )
        doubt = " (which may be chance)" if difference.estimate and difference.low <= 0 else ""
        is_alike = dominance.cost_ratio <= spread
        dear = "is about as dear" if is_alike else f"costs {dominance.cost_ratio:.2f} times as much"
        return f"{dominance.backbone} is {better}{doubt}, and this one {dear}"
    if gain is None:
        return "the cheapest"
    worth = f"{100 * gain.estimate:.2f} points more than the next cheaper choice"
    return worth if gain.low > 0 else f"{worth}, which may be chance: its interval holds zero"
