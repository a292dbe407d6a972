"""What one kind of augmentation does to accuracy and to pairs of classes, from predictions of the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convoy.core.config import StrictModel
from convoy.core.confusions import PairRise, pair_rises
from convoy.core.statistics import (
    Interval,
    McNemarResult,
    holm_adjusted,
    mcnemar_test,
    paired_rate_difference,
    wilson_interval,
)
from convoy.vision.augmentation_policy import AugmentationPolicy
from convoy.vision.augmentation_strengths import Strength

_SIGNIFICANT_P = 0.05
# Of two classes that augmentation turns into one another, so many of each are taken for the other.
_ALIKE_SHARE = 0.2
_MOST_PAIRS = 5


class NamedPolicy(StrictModel):
    """A policy to measure: one kind at one strength, or one of the user's own, which has no strength."""

    name: str
    strength: Strength | None
    policy: AugmentationPolicy

    def __str__(self) -> str:
        return self.name if self.strength is None else f"{self.name} ({self.strength})"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PolicyOutcome:
    """Predicted classes of the same labelled rows: by what learnt without the policy, and by what learnt with it.

    `drawn_N` is what the one without says of the rows as the policy draws them, None where nobody asked; -1 stands for
    a row that could not be read.
    """

    policy: NamedPolicy
    labels_N: NDArray[np.int64]
    without_N: NDArray[np.int64]
    with_N: NDArray[np.int64]
    drawn_N: NDArray[np.int64] | None = None


class Verdict(StrEnum):
    """What a kind does to top-1; gains and losses are significant at 5 %, adjusted for the number of policies."""

    GAIN = "gain"
    LOSS = "loss"
    UNDECIDED = "undecided"


class ConfusedPair(StrictModel):
    """Two classes that are taken for one another more often after learning with the policy, on images as they are.

    `without` and `with_policy` count such errors among the `num_rows` rows of both; `p` is adjusted for all pairs of
    all policies.
    """

    first: str
    second: str
    num_rows: int
    without: int
    with_policy: int
    p: float


class AlikePair(StrictModel):
    """Two classes that the policy turns into one another.

    Each, as drawn, is taken for the other by the model that learnt without the policy. The shares are of the rows
    of each class; `p` is adjusted for all pairs of all policies.
    """

    first: str
    second: str
    first_as_second: float
    second_as_first: float
    p: float


class PolicyEffect(StrictModel):
    """What one policy does. Differences are top-1 with it less top-1 without it, on the same rows.

    `adjusted_p` is the mid-p value of McNemar's test, adjusted for the number of policies (Holm 1979); `top1_as_drawn`
    is what the probe without the policy gets right of drawn images: how much of the kind it knows already. `confused`
    are the pairs whose errors rose most, tested or not; `alike` pass the test. `warning` is None unless the
    kind does harm, or breaks labels without doing any good.
    """

    name: str
    strength: Strength | None
    policy: dict[str, Any]
    num_rows: int
    top1: Interval
    difference: Interval
    mcnemar: McNemarResult
    adjusted_p: float
    verdict: Verdict
    top1_as_drawn: float | None
    confused: list[ConfusedPair]
    alike: list[AlikePair]
    warning: str | None


def judge_outcomes(outcomes: Sequence[PolicyOutcome], classes: Sequence[str]) -> list[PolicyEffect]:
    """The effect of each policy, in their order; p values are adjusted over all of them."""
    known = [_readable(outcome) for outcome in outcomes]
    tests = [
        mcnemar_test(outcome.with_N == outcome.labels_N, outcome.without_N == outcome.labels_N)
        for outcome in known
    ]
    adjusted = holm_adjusted([test.mid_p for test in tests])
    rises = [pair_rises(outcome.labels_N, outcome.without_N, outcome.with_N) for outcome in known]
    confused = _adjusted(rises, [[rise.p for rise in of_policy] for of_policy in rises])
    turned = [
        [] if outcome.drawn_N is None else pair_rises(outcome.labels_N, outcome.without_N, outcome.drawn_N)
        for outcome in known
    ]
    alike = _adjusted(turned, [[rise.p_each for rise in of_policy] for of_policy in turned])
    return [
        _effect(outcome, test, p, _confused(pairs, classes), _alike(twins, classes))
        for outcome, test, p, pairs, twins in zip(known, tests, adjusted, confused, alike, strict=True)
    ]


def _readable(outcome: PolicyOutcome) -> PolicyOutcome:
    """The rows that every side could read."""
    sides = [outcome.without_N, outcome.with_N] + ([] if outcome.drawn_N is None else [outcome.drawn_N])
    rows = np.logical_and.reduce([side >= 0 for side in sides])
    return PolicyOutcome(
        policy=outcome.policy,
        labels_N=outcome.labels_N[rows],
        without_N=outcome.without_N[rows],
        with_N=outcome.with_N[rows],
        drawn_N=None if outcome.drawn_N is None else outcome.drawn_N[rows],
    )


def _adjusted(
    rises: Sequence[Sequence[PairRise]], p_values: Sequence[Sequence[float]]
) -> list[list[tuple[PairRise, float]]]:
    """The pairs of each policy with their p values, adjusted over the pairs of all policies together."""
    flat = iter(holm_adjusted([p for of_policy in p_values for p in of_policy]))
    return [[(rise, next(flat)) for rise in of_policy] for of_policy in rises]


def _confused(pairs: Sequence[tuple[PairRise, float]], classes: Sequence[str]) -> list[ConfusedPair]:
    """The pairs that were confused more often afterwards, those that rose most."""
    return [
        ConfusedPair(
            first=classes[rise.first],
            second=classes[rise.second],
            num_rows=rise.num_rows,
            without=rise.before,
            with_policy=rise.after,
            p=p,
        )
        for rise, p in pairs[:_MOST_PAIRS]
        if rise.after > rise.before
    ]


def _alike(pairs: Sequence[tuple[PairRise, float]], classes: Sequence[str]) -> list[AlikePair]:
    return [
        AlikePair(
            first=classes[rise.first],
            second=classes[rise.second],
            first_as_second=rise.forward_share,
            second_as_first=rise.backward_share,
            p=p,
        )
        for rise, p in pairs
        if p < _SIGNIFICANT_P and min(rise.forward_share, rise.backward_share) >= _ALIKE_SHARE
    ]


def _effect(
    outcome: PolicyOutcome,
    test: McNemarResult,
    adjusted_p: float,
    confused: list[ConfusedPair],
    alike: list[AlikePair],
) -> PolicyEffect:
    is_right_N = outcome.with_N == outcome.labels_N
    difference = paired_rate_difference(is_right_N, outcome.without_N == outcome.labels_N)
    verdict = Verdict.UNDECIDED
    if adjusted_p < _SIGNIFICANT_P:
        verdict = Verdict.GAIN if difference.estimate > 0 else Verdict.LOSS
    drawn_N = outcome.drawn_N
    return PolicyEffect(
        name=outcome.policy.name,
        strength=outcome.policy.strength,
        policy=outcome.policy.policy.model_dump(mode="json", exclude_none=True),
        num_rows=len(is_right_N),
        top1=wilson_interval(int(is_right_N.sum()), len(is_right_N)),
        difference=difference,
        mcnemar=test,
        adjusted_p=adjusted_p,
        verdict=verdict,
        top1_as_drawn=None if drawn_N is None else float((drawn_N == outcome.labels_N).mean()),
        confused=confused,
        alike=alike,
        warning=_warning(outcome.policy, verdict, difference, confused, alike),
    )


def _warning(
    policy: NamedPolicy,
    verdict: Verdict,
    difference: Interval,
    confused: Sequence[ConfusedPair],
    alike: Sequence[AlikePair],
) -> str | None:
    """What is to be said against a policy, in one sentence; nothing against one that gains."""
    if verdict is Verdict.GAIN:
        return None
    said = []
    if verdict is Verdict.LOSS:
        low, high = (100 * -bound for bound in (difference.high, difference.low))
        said.append(f"costs {-100 * difference.estimate:.1f} points of top-1 (95 %: {low:.1f} to {high:.1f})")
        said += [_words(pair) for pair in confused[:1] if pair.p >= _SIGNIFICANT_P]
    said += [_words(pair) for pair in confused if pair.p < _SIGNIFICANT_P]
    said += [
        f"turns {pair.first} and {pair.second} into one another: drawn, {100 * pair.first_as_second:.0f} % of"
        f" {pair.first} are taken for {pair.second}, {100 * pair.second_as_first:.0f} % of {pair.second} for"
        f" {pair.first}"
        for pair in alike
    ]
    return f"{policy} {'; '.join(said)}" if said else None


def _words(pair: ConfusedPair) -> str:
    return (
        f"{pair.first} and {pair.second} are confused {pair.with_policy} times instead of {pair.without}"
        f" in {pair.num_rows}"
    )
