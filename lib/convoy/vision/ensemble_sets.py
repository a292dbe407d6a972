"""Which sets of members are worth comparing: forward selection under growing budgets, from stored predictions alone."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convoy.core.crop_policies import Averaging
from convoy.vision.ensembling import Floats, joint_logits, mean_nll, nll_columns

# Budgets between that of the cheapest member and that of all, in equal ratios.
_NUM_BUDGETS = 12


def growing_sets(
    values_MNK: Floats,
    labels_N: NDArray[Any],
    averaging: Averaging,
    *,
    costs_M: Sequence[float],
    max_members: int | None = None,
    budget: float = inf,
) -> list[tuple[int, ...]]:
    """Every single member, and the sets that forward selection finds under growing budgets; members ascend.

    Under a budget it begins with the best member that can be paid, and adds the one that lowers the NLL of the
    plain mean most for its cost, as long as the sum of costs allows. So three cheap members that together beat a
    dear one are found although the dear one is the best alone. Without a budget every set on the way counts. What
    the user can pay, `budget`, is one of them, as the best set for it may lie between two others.
    """
    values_MNK, labels_N = nll_columns(values_MNK, labels_N, averaging)
    selection = _Selection(values_MNK, labels_N, averaging, costs_M)
    num_members = len(values_MNK)
    allowed = min(max_members or num_members, num_members)
    path = selection.path(inf, allowed)
    found: list[tuple[int, ...]] = [(member,) for member in range(num_members)]
    found += [tuple(sorted(path[:size])) for size in range(1, len(path) + 1)]
    budgets = np.geomspace(min(costs_M), sum(costs_M), _NUM_BUDGETS).tolist()
    for allowance in (*budgets, budget):
        # The ends of the range must hold what costs exactly as much.
        found.append(tuple(sorted(selection.path(allowance * (1 + 1e-9), allowed))))
    return [members for members in dict.fromkeys(found) if members]


class _Selection:
    """Forward selection without replacement, by the NLL of the plain mean for the cost."""

    def __init__(
        self, values_MNK: Floats, labels_N: NDArray[Any], averaging: Averaging, costs_M: Sequence[float]
    ) -> None:
        self._values_MNK, self._labels_N, self._averaging = values_MNK, labels_N, averaging
        self._costs_M = costs_M

    def path(self, budget: float, max_members: int) -> list[int]:
        """Members in the order in which they come in."""
        affordable = [member for member, cost in enumerate(self._costs_M) if cost <= budget]
        chosen: list[int] = []
        while affordable and len(chosen) < max_members:
            chosen.append(self._next(chosen, affordable))
            left = budget - sum(self._costs_M[member] for member in chosen)
            affordable = [
                member for member in affordable if member not in chosen and self._costs_M[member] <= left
            ]
        return chosen

    def _next(self, chosen: Sequence[int], affordable: Sequence[int]) -> int:
        losses = {member: self._loss([*chosen, member]) for member in affordable}
        if not chosen:
            return min(losses, key=lambda member: losses[member])
        before = self._loss(chosen)
        gains = {member: before - loss for member, loss in losses.items()}
        helpful = [member for member in gains if gains[member] > 0]
        if helpful:
            return max(helpful, key=lambda member: gains[member] / self._costs_M[member])
        # The method may still give it a small weight, which the plain mean does not.
        return max(gains, key=lambda member: gains[member])

    def _loss(self, members: Sequence[int]) -> float:
        equal_M = np.full(len(members), 1 / len(members))
        joint_NK = joint_logits(self._values_MNK[list(members)], equal_M, self._averaging)
        if self._averaging is Averaging.PROBABILITIES:
            return float(-joint_NK.mean())
        return mean_nll(joint_NK, self._labels_N)
