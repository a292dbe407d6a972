"""Calibrating a gate: which looks come first and when they are believed, from kept outputs of val rows alone.

Nothing is run: the looks and the exact committee are averages of the same outputs of members and views. Some of the
rows choose among many gates; what the chosen one holds is tested on the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from itertools import permutations
from math import ceil, inf, log

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr, softmax

from convoy.core.crop_policies import Averaging, CropPlan, CropPolicy, view_indices
from convoy.core.errors import ConfigError
from convoy.vision.committee_options import GateLook, GateOptions, gate_passes
from convoy.vision.ensembling import Floats, averaged

# Above every probability: a look that is never believed.
_NEVER = 2.0
# Into so many equal parts the disagreements that are allowed are shared out among the looks.
_NUM_SHARES = 8
# The share of the rows that choose the looks; the others test how low the thresholds may be.
_CHOOSING_SHARE = 1 / 3
# One-sided, that a gate holds its agreement on other rows.
_CONFIDENCE = 0.9
# From believing nothing to believing every row in about so many steps.
_NUM_STEPS = 256
# Confidences that are closer to 1 differ by rounding only.
_LEAST_DOUBT = 1e-9


_Looks = tuple[tuple[tuple[int, ...], CropPolicy], ...]
# The top-1 class of each row, and its probability.
_LookOutput = tuple[NDArray[np.int64], NDArray[np.float64]]


class _Part(Enum):
    """Which of the rows."""

    ALL = auto()
    CHOOSING = auto()
    TESTING = auto()


@dataclass(frozen=True, slots=True, eq=False)
class CalibratedGate:
    """A gate on some rows: its agreement with the exact committee, its passes an image, and its top-1 classes."""

    gate: GateOptions
    agreement: float
    mean_passes: float
    class_N: NDArray[np.int64]


class GateCalibration:
    """Rows with the outputs of all members and views: float32 `logits_MVNK`, in the order of the crop plan.

    `weights_M` sum to 1; `temperatures_M` divide the logits, as in `Committee`. `exact_passes` are those of an image
    without a gate.
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
        self._logits_MVNK, self._averaging, self._plan = logits_MVNK, averaging, plan
        self._weights_M, self._temperatures_M = np.asarray(weights_M, np.float64), temperatures_M
        num_members, num_views, num_rows = logits_MVNK.shape[:3]
        self.exact_passes = num_members * num_views
        # In a mixed order, as neighbours may be of one class; the same order for the same rows.
        mixed = np.random.default_rng(0).permutation(num_rows)
        num_choosing = round(_CHOOSING_SHARE * num_rows)
        self._rows = {
            _Part.ALL: np.arange(num_rows),
            _Part.CHOOSING: mixed[:num_choosing],
            _Part.TESTING: mixed[num_choosing:],
        }
        self._known: dict[tuple[tuple[int, ...], tuple[int, ...], _Part], _LookOutput] = {}
        self._exact_N, _ = self._look(tuple(range(num_members)), tuple(range(num_views)), _Part.ALL)

    def best_gate(self, target_agreement: float, *, confidence: float = _CONFIDENCE) -> CalibratedGate:
        """The gate with the fewest expected passes of those that hold the target on other rows, at the `confidence`.

        A third of the rows chooses the looks and the proportions of their thresholds. On the others all thresholds
        fall together, as long as the share of top-1 classes that equal the exact committee's is shown to be at least
        the target, by a one-sided exact binomial test. As the steps are fixed beforehand and the first that fails
        ends them, no correction for their number is due (Angelopoulos et al. 2021, Learn then Test). The figures
        are of these rows. Where they are too few to show the target, no look is believed.

        Tried are one look, two looks, and the best two with a third, each adding a member at the centre crop; and
        one look of a member at both crops of `flip`. Raises ConfigError where the plan has no centre crop.
        """
        if view_indices(CropPolicy.CENTER, self._plan) is None:
            raise ConfigError(
                f"the crops of '{self._plan.policy}' have no centre crop to look at first",
                where="gate",
                next_step="choose flip, five or ten, or evaluate in mode exact",
            )
        exact_N = self._exact(_Part.TESTING)
        allowed = _allowed_disagreements(len(exact_N), target_agreement, confidence)
        chosen = self._chosen(int((1 - target_agreement) * len(self._rows[_Part.CHOOSING]) + 1e-9))
        outputs = self._outputs(_looks(chosen), _Part.TESTING)
        best = self._outcome(_scaled(chosen, None), outputs, _Part.TESTING)
        for scale in self._scales(chosen):
            found = self._outcome(_scaled(chosen, scale), outputs, _Part.TESTING)
            if int((found.class_N != exact_N).sum()) > allowed:
                break
            best = found
        return best

    def measured(self, gate: GateOptions) -> CalibratedGate:
        """A gate that was calibrated on other rows, on these."""
        return self._outcome(gate, self._outputs(_looks(gate), _Part.ALL), _Part.ALL)

    def _chosen(self, allowed: int) -> GateOptions:
        """The gate with the fewest passes on the choosing rows, of which at most `allowed` disagree."""
        best = min(
            (self._fitted(looks, allowed) for looks in self._short_chains()), key=lambda one: one.mean_passes
        )
        members = best.gate.looks[-1].members
        if len(best.gate.looks) == 2:
            others = (member for member in range(len(self._weights_M)) if member not in members)
            fitted = (self._fitted(_centre_chain((*members, other)), allowed) for other in others)
            best = min((best, *fitted), key=lambda one: one.mean_passes)
        return best.gate

    def _scales(self, gate: GateOptions) -> Iterator[float]:
        """What multiplies the distances of thresholds from 1, ascending: each believes some more rows, the last all."""
        outputs = self._outputs(_looks(gate), _Part.CHOOSING)
        ratios = [
            np.maximum(1 - confidence_N, _LEAST_DOUBT) / (1 - look.threshold)
            for look, (_, confidence_N) in zip(gate.looks, outputs, strict=True)
            if look.threshold < 1
        ]
        if ratios:
            yield from np.unique(np.quantile(np.concatenate(ratios), np.linspace(0, 1, _NUM_STEPS))).tolist()
            yield inf

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
        outputs = self._outputs(looks, _Part.CHOOSING)
        candidates = (
            self._gate(looks, outputs, [part * allowed / _NUM_SHARES for part in shares])
            for shares in _compositions(_NUM_SHARES, len(looks))
        )
        return min(candidates, key=lambda one: one.mean_passes)

    def _gate(
        self, looks: _Looks, outputs: Sequence[_LookOutput], allowed: Sequence[float]
    ) -> CalibratedGate:
        """The lowest thresholds, look by look; what one look does not use up is left to the next."""
        exact_N = self._exact(_Part.CHOOSING)
        is_open_N = np.ones(len(exact_N), dtype=bool)
        thresholds, left = [], 0.0
        for (class_N, confidence_N), share in zip(outputs, allowed, strict=True):
            left += share
            is_wrong_N = class_N != exact_N
            threshold = _threshold(confidence_N[is_open_N], is_wrong_N[is_open_N], left)
            is_final_N = is_open_N & (confidence_N >= threshold)
            left -= int(is_wrong_N[is_final_N].sum())
            is_open_N &= ~is_final_N
            thresholds.append(threshold)
        first, *then = (
            GateLook(members=members, policy=policy, threshold=threshold)
            for (members, policy), threshold in zip(looks, thresholds, strict=True)
        )
        return self._outcome(GateOptions(**first.model_dump(), then=tuple(then)), outputs, _Part.CHOOSING)

    def _outcome(self, gate: GateOptions, outputs: Sequence[_LookOutput], part: _Part) -> CalibratedGate:
        """The gate on the rows that the outputs of its looks are of."""
        passes = list(gate_passes(gate, self._plan, len(self._weights_M)).values())
        exact_N = self._exact(part)
        passes_N, class_N = np.full(len(exact_N), passes[-1]), exact_N.copy()
        # From the last look to the first, as the first that is sure decides.
        for look, (seen_N, confidence_N), cost in reversed(
            list(zip(gate.looks, outputs, passes[:-1], strict=True))
        ):
            is_sure_N = confidence_N >= look.threshold
            passes_N[is_sure_N], class_N[is_sure_N] = cost, seen_N[is_sure_N]
        return CalibratedGate(gate, float((class_N == exact_N).mean()), float(passes_N.mean()), class_N)

    def _exact(self, part: _Part) -> NDArray[np.int64]:
        exact_N: NDArray[np.int64] = self._exact_N[self._rows[part]]
        return exact_N

    def _outputs(self, looks: _Looks, part: _Part) -> list[_LookOutput]:
        return [
            self._look(members, tuple(view_indices(policy, self._plan) or ()), part)
            for members, policy in looks
        ]

    def _look(self, members: tuple[int, ...], views: tuple[int, ...], part: _Part) -> _LookOutput:
        """The top-1 class of each of the rows and its probability, from some members and views.

        Kept is what comes of it, and not the outputs of all members and views, for which memory may be too small.
        """
        key = members, views, part
        if key not in self._known:
            joint_NK = self._joint(members, views, self._rows[part])
            if self._averaging is not Averaging.PROBABILITIES:
                joint_NK = softmax(joint_NK, axis=-1)
            self._known[key] = joint_NK.argmax(axis=1), joint_NK.max(axis=1)
        return self._known[key]

    def _joint(self, members: Sequence[int], views: Sequence[int], rows: NDArray[np.int64]) -> Floats:
        """The weighted mean over members of the mean over views, of probabilities or logits."""
        weights = self._weights_M[list(members)] / self._weights_M[list(members)].sum()
        joint_NK = np.zeros((len(rows), self._logits_MVNK.shape[3]))
        for member, weight in zip(members, weights, strict=True):
            for view in views:
                logits_NK, temperature = self._logits_MVNK[member, view][rows], self._temperatures_M[member]
                joint_NK += weight / len(views) * averaged(logits_NK, self._averaging, temperature)
        return joint_NK


def rows_to_show(target_agreement: float) -> int:
    """With fewer rows to calibrate on no gate can be shown to hold the agreement, even if none of them disagrees."""
    num_testing = ceil(log(1 - _CONFIDENCE) / log(target_agreement))
    return ceil(num_testing / (1 - _CHOOSING_SHARE))


def _centre_chain(members: tuple[int, ...]) -> _Looks:
    """Looks at the centre crop, each with one member more."""
    return tuple((members[:count], CropPolicy.CENTER) for count in range(1, len(members) + 1))


def _looks(gate: GateOptions) -> _Looks:
    return tuple((look.members, look.policy) for look in gate.looks)


def _scaled(gate: GateOptions, scale: float | None) -> GateOptions:
    """The gate with the distances of its thresholds from 1 multiplied; None: no look is believed."""

    def scaled(threshold: float) -> float:
        if scale is None or threshold >= 1:
            return _NEVER
        return max(0.0, 1 - scale * (1 - threshold))

    then = tuple(look.model_copy(update={"threshold": scaled(look.threshold)}) for look in gate.then)
    return gate.model_copy(update={"threshold": scaled(gate.threshold), "then": then})


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
    # How likely so few would be if the target were just not held (Clopper and Pearson 1934).
    chances = bdtr(np.arange(num_rows), num_rows, 1 - target)
    return int((chances <= 1 - confidence).sum()) - 1


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
