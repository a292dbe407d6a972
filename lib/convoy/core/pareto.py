"""Pareto fronts of two quantities: a cost, where less is better, and a value, where more is."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence


def front_places(costs_N: Sequence[float], values_N: Sequence[float]) -> list[int]:
    """The places of the points whose value no cheaper point reaches, from the cheapest to the dearest.

    Of points that agree in both the first counts, so costs and values both ascend along the front.
    """
    front, best = [], -math.inf
    for place in sorted(range(len(costs_N)), key=lambda one: (costs_N[one], -values_N[one])):
        if values_N[place] > best:
            front.append(place)
            best = values_N[place]
    return front


def dominators(costs_N: Sequence[float], values_N: Sequence[float]) -> list[int | None]:
    """For each point the most valuable one that costs no more, where that is another; None for those of the front."""
    front = front_places(costs_N, values_N)
    costs_F = [costs_N[place] for place in front]
    best_N = [front[bisect.bisect_right(costs_F, cost) - 1] for cost in costs_N]
    on_front = set(front)
    return [None if place in on_front else best for place, best in enumerate(best_N)]
