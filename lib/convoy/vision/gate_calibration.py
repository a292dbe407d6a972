"""Calibrating a gate: which looks come first and when they are believed, from kept outputs of val rows alone.

Nothing is run: the looks and the exact committee are averages of the same outputs of members and views.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from convoy.core.crop_policies import Averaging, CropPlan, CropPolicy, view_indices
from convoy.core.errors import ConfigError
from convoy.core.statistics import wilson_interval
from convoy.vision.committee_options import GateLook, GateOptions, gate_passes

# Above every probability: a look that is never believed.
_NEVER = 2.0
# Into so many equal parts the disagreements that are allowed are shared out among the looks.
_NUM_SHARES = 8

_Looks = tuple[tuple[tuple[int, ...], CropPolicy], ...]
# The top-1 class of each row, and its probability.
_LookOutput = tuple[NDArray[np.int64], NDArray[np.float64]]


@dataclass(frozen=True, slots=True, eq=False)
class CalibratedGate:
    """A gate on some rows: its agreement with the exact committee, its passes an image, and its top-1 classes."""

    gate: GateOptions
    agreement: float
    mean_passes: float
    class_N: NDArray[np.int64]


class GateCalibration:
    """Rows with the outputs of all members and views: float32 `logits_MVNK`, in the order of the crop plan.

    `weights_M` sum to 1; `temperatures_M` divide the logits, as in `Committee`.
    """

    def __init__(
        self,
        logits_MVNK: NDArray[np.floating],
        *,
        weights_M: Sequence[float],
        temperatures_M: Sequence[float],
        averaging: Averaging,
        plan: CropPlan,
    ) -> None:
        scale_M111 = np.asarray(temperatures_M, np.float64)[:, None, None, None]
        values_MVNK = logits_MVNK / scale_M111
        self._averaging, self._plan = averaging, plan
        self._values_MVNK = softmax(values_MVNK, axis=-1) if self._averages_probabilities else values_MVNK
        self._weights_M = np.asarray(weights_M, np.float64)
        every_view = range(values_MVNK.shape[1])
        self._exact_N, _ = self._look(tuple(range(len(weights_M))), every_view)

    def best_gate(self, target_agreement: float, *, confidence: float = 0.9) -> CalibratedGate:
        """The gate with the fewest expected passes that agrees with the exact committee on the rows.

        The Wilson lower bound of the share of equal top-1 classes, at the one-sided `confidence`, is at least the
        target; at 0.5 it is the share itself, which rows that chose the gate flatter. Where the rows are too few
        to prove the target, no look is believed. Tried are one look, two looks, and the best two with a third,
        each adding a member at the centre crop; and one look of a member at both crops of `flip`. Raises
        ConfigError where the plan has no centre crop.
        """
        if view_indices(CropPolicy.CENTER, self._plan) is None:
            raise ConfigError(
                f"the crops of '{self._plan.policy}' have no centre crop to look at first",
                where="gate",
                next_step="choose flip, five or ten, or evaluate in mode exact",
            )
        allowed = _allowed_disagreements(len(self._exact_N), target_agreement, confidence)
        best = min(
            (self._fitted(looks, allowed) for looks in self._short_chains()), key=lambda one: one.mean_passes
        )
        members = best.gate.looks[-1].members
        if len(best.gate.looks) == 2:
            others = (member for member in range(len(self._weights_M)) if member not in members)
            chains = [_centre_chain((*members, other)) for other in others]
            fitted = (self._fitted(looks, allowed) for looks in chains)
            best = min((best, *fitted), key=lambda one: one.mean_passes)
        return best

    def measured(self, gate: GateOptions) -> CalibratedGate:
        """A gate that was calibrated on other rows, on these."""
        return self._outcome(gate, self._outputs(tuple((look.members, look.policy) for look in gate.looks)))

    def _short_chains(self) -> Iterator[_Looks]:
        num_members = len(self._weights_M)
        for member in range(num_members):
            yield _centre_chain((member,))
            if view_indices(CropPolicy.FLIP, self._plan) is not None:
                yield (((member,), CropPolicy.FLIP),)
        for pair in permutations(range(num_members), 2):
            yield _centre_chain(pair)

    def _fitted(self, looks: _Looks, allowed: int) -> CalibratedGate:
        """The thresholds that leave the least to do, over the ways to share the allowed disagreements out."""
        outputs = self._outputs(looks)
        # Shares of -1 are -1 each: then no row may be believed.
        shares = _compositions(_NUM_SHARES, len(looks)) if allowed >= 0 else [(_NUM_SHARES,) * len(looks)]
        candidates = (
            self._gate(looks, outputs, [part * allowed / _NUM_SHARES for part in one]) for one in shares
        )
        return min(candidates, key=lambda one: one.mean_passes)

    def _gate(
        self, looks: _Looks, outputs: Sequence[_LookOutput], allowed: Sequence[float]
    ) -> CalibratedGate:
        """The lowest thresholds, look by look; what one look does not use up is left to the next."""
        is_open_N = np.ones(len(self._exact_N), dtype=bool)
        thresholds, left = [], 0.0
        for (class_N, confidence_N), share in zip(outputs, allowed, strict=True):
            left += share
            is_wrong_N = class_N != self._exact_N
            threshold = _threshold(confidence_N[is_open_N], is_wrong_N[is_open_N], left)
            is_final_N = is_open_N & (confidence_N >= threshold)
            left -= int(is_wrong_N[is_final_N].sum())
            is_open_N &= ~is_final_N
            thresholds.append(threshold)
        first, *then = (
            GateLook(members=members, policy=policy, threshold=threshold)
            for (members, policy), threshold in zip(looks, thresholds, strict=True)
        )
        return self._outcome(GateOptions(**first.model_dump(), then=tuple(then)), outputs)

    def _outcome(self, gate: GateOptions, outputs: Sequence[_LookOutput]) -> CalibratedGate:
        passes = list(gate_passes(gate, self._plan, len(self._weights_M)).values())
        passes_N, class_N = np.full(len(self._exact_N), passes[-1]), self._exact_N.copy()
        # From the last look to the first, as the first that is sure decides.
        for look, (seen_N, confidence_N), cost in reversed(
            list(zip(gate.looks, outputs, passes[:-1], strict=True))
        ):
            is_sure_N = confidence_N >= look.threshold
            passes_N[is_sure_N], class_N[is_sure_N] = cost, seen_N[is_sure_N]
        return CalibratedGate(gate, float((class_N == self._exact_N).mean()), float(passes_N.mean()), class_N)

    def _outputs(self, looks: _Looks) -> list[_LookOutput]:
        return [self._look(members, view_indices(policy, self._plan) or ()) for members, policy in looks]

    def _look(self, members: Sequence[int], views: Sequence[int]) -> _LookOutput:
        """The top-1 class of each row and its probability, from some members and views."""
        means_MNK = self._values_MVNK[list(members)][:, list(views)].mean(axis=1)
        joint_NK = np.average(means_MNK, axis=0, weights=self._weights_M[list(members)])
        probabilities_NK = joint_NK if self._averages_probabilities else softmax(joint_NK, axis=-1)
        return probabilities_NK.argmax(axis=1), probabilities_NK.max(axis=1)

    @property
    def _averages_probabilities(self) -> bool:
        return self._averaging is Averaging.PROBABILITIES


def _centre_chain(members: tuple[int, ...]) -> _Looks:
    """Looks at the centre crop, each with one member more."""
    return tuple((members[:count], CropPolicy.CENTER) for count in range(1, len(members) + 1))


def _compositions(total: int, num_parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to write `total` as an ordered sum of whole numbers from 0 on."""
    if num_parts == 1:
        yield (total,)
        return
    for first in range(total + 1):
        for rest in _compositions(total - first, num_parts - 1):
            yield (first, *rest)


def _allowed_disagreements(num_rows: int, target: float, confidence: float) -> int:
    """The most rows that may disagree, -1 where even none is not enough evidence."""
    if not 0.5 <= confidence < 1:
        raise ConfigError(
            "a one-sided confidence is from 0.5 to below 1",
            where=f"confidence={confidence}",
            next_step="use 0.95",
        )
    if confidence == 0.5:
        return int((1 - target) * num_rows + 1e-9)
    allowed = -1
    while allowed < num_rows:
        agreeing = num_rows - allowed - 1
        if wilson_interval(agreeing, num_rows, confidence=2 * confidence - 1).low < target:
            break
        allowed += 1
    return allowed


def _threshold(confidence_N: NDArray[np.float64], is_wrong_N: NDArray[np.bool_], allowed: float) -> float:
    """A confidence from which on at most `allowed` rows are wrong, as low as can be.

    It lies between those of two rows, so that rounding does not decide.
    """
    order = np.argsort(-confidence_N, kind="stable")
    sorted_N, num_wrong_N = confidence_N[order], np.cumsum(is_wrong_N[order])
    below_N = np.append(sorted_N[1:], 0.999 * sorted_N[-1:])
    # Rows of equal confidence are believed together.
    possible = np.flatnonzero((below_N < sorted_N) & (num_wrong_N <= allowed))
    return float(sorted_N[possible[-1]] + below_N[possible[-1]]) / 2 if len(possible) else _NEVER
