"""Choosing and weighing the members of an ensemble, from stored predictions alone: pure functions over arrays.

`logits_MVNK` are outputs of M members in V views of N rows for K classes. `values_MNK` are what the averaging rule
averages: each member's mean over the views, of probabilities or of logits, at its own temperature. The joint
output of weights w that sum to 1 is the sum of w_m values_m, as in `vision.committee`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize, minimize_scalar
from scipy.special import log_softmax, logsumexp, softmax

from convoy.core.crop_policies import Averaging
from convoy.core.errors import DataError
from convoy.core.large_arrays import large_array

# Temperatures are looked for between exp(-3) and exp(3): a twentieth and twenty.
_LOG_TEMPERATURES = (-3.0, 3.0)
# Weights below this are those of members that do not help.
_LEAST_WEIGHT = 1e-3
# How far above the least NLL weights may stay, in nats, unless they need more steps than so many.
_NLL_TOLERANCE, _MAX_STEPS = 1e-6, 10_000
# Smaller bags may hold nothing but bad members, which would get their weight then.
_SMALLEST_BAG = 6

# The least probability whose logarithm is taken.
_TINY = float(np.finfo(np.float64).tiny)

Floats = NDArray[np.float64]
# What is to be small: by the objective, then by the other one.
_Loss = tuple[float, float]


class Objective(StrEnum):
    """What a selection improves on the validation rows; the other one breaks ties."""

    NLL = "nll"
    TOP1 = "top1"


def averaged(logits_NK: NDArray[Any], averaging: Averaging, temperature: float) -> Floats:
    """What the rule averages of one view."""
    wide_NK = np.asarray(logits_NK, np.float64) / temperature
    return np.asarray(softmax(wide_NK, axis=1)) if averaging is Averaging.PROBABILITIES else wide_NK


def member_values(
    logits_MVNK: NDArray[Any], views: Sequence[int], averaging: Averaging, temperatures_M: Sequence[float]
) -> Floats:
    """The values_MNK of some views, on disk where memory is short, see `core.large_arrays`."""
    num_members, _, num_rows, num_classes = logits_MVNK.shape
    values_MNK: Floats = large_array((num_members, num_rows, num_classes), np.float64)
    for values_NK, logits_VNK, temperature in zip(values_MNK, logits_MVNK, temperatures_M, strict=True):
        # One view at a time: the float64 copy of all of them may not fit.
        values_NK[:] = sum(averaged(logits_VNK[view], averaging, temperature) for view in views) / len(views)
    return values_MNK


def joint_logits(
    values_MNK: Floats, weights_M: Sequence[float] | Floats, averaging: Averaging, temperature: float = 1.0
) -> Floats:
    """The joint logits_NK: normalised log-probabilities before the temperature where probabilities are averaged."""
    joint_NK = np.tensordot(np.asarray(weights_M, np.float64), values_MNK, axes=1)
    if averaging is Averaging.PROBABILITIES:
        joint_NK = np.log(np.maximum(joint_NK, _TINY))
    return np.asarray(joint_NK / temperature)


def mean_of_views(logits_VNK: NDArray[Any], averaging: Averaging, temperature: float = 1.0) -> Floats:
    """The logits_NK of one member over all of its views, at its temperature."""
    every_view = range(len(logits_VNK))
    return joint_logits(
        member_values(logits_VNK[None], every_view, averaging, [temperature]), [1.0], averaging
    )


def mean_nll(logits_NK: NDArray[Any], labels_N: NDArray[Any]) -> float:
    """The mean negative log-likelihood of the labels, in nats."""
    log_probabilities_NK = log_softmax(np.asarray(logits_NK, np.float64), axis=1)
    return float(-log_probabilities_NK[np.arange(len(labels_N)), labels_N].mean())


def top1(logits_NK: NDArray[Any], labels_N: NDArray[Any]) -> float:
    """The share of rows whose largest logit is the label's."""
    return float((np.asarray(logits_NK).argmax(axis=1) == labels_N).mean())


def fit_temperature(logits_NK: NDArray[Any], labels_N: NDArray[Any]) -> float:
    """The temperature that makes the labels likeliest (Guo et al. 2017, section 4.2).

    The NLL has one minimum in the inverse temperature, so a bounded search finds it.
    """
    wide_NK = np.asarray(logits_NK, np.float64)
    return _likeliest_temperature(lambda temperature: mean_nll(wide_NK / temperature, labels_N))


def fit_member_temperature(logits_VNK: NDArray[Any], labels_N: NDArray[Any], averaging: Averaging) -> float:
    """The temperature of a member that makes the labels likeliest by its mean over the views, as in `member_values`."""
    if averaging is Averaging.LOGITS:
        return fit_temperature(logits_VNK.mean(axis=0, dtype=np.float64), labels_N)
    largest_VN = logits_VNK.max(axis=2)
    own_VN = np.asarray(logits_VNK[:, np.arange(len(labels_N)), labels_N] - largest_VN, np.float64)

    def nll(temperature: float) -> float:
        # One view at a time and no wider than it is: of all of them there are many.
        log_sums_VN = [
            np.log(np.exp((logits_NK - largest_N[:, None]) / temperature).sum(axis=1))
            for logits_NK, largest_N in zip(logits_VNK, largest_VN, strict=True)
        ]
        log_own_VN = own_VN / temperature - np.stack(log_sums_VN)
        return float(np.log(len(logits_VNK)) - logsumexp(log_own_VN, axis=0).mean())

    return _likeliest_temperature(nll)


def greedy_selection(
    values_MNK: Floats,
    labels_N: NDArray[Any],
    averaging: Averaging,
    *,
    objective: Objective = Objective.NLL,
    num_rounds: int = 50,
    num_bags: int = 20,
    bag_share: float = 0.5,
    seed: int = 0,
) -> Floats:
    """Weights_M by forward selection with replacement, averaged over bags of members; they sum to 1.

    Begins with the k best members, for the k that is best. A member is added in every round, the one that helps
    most or harms least, and the best round is kept (Caruana et al. 2004). Each bag sees a random `bag_share` of the
    members, and 6 at least, so that one member which fits the validation rows by chance cannot win everywhere
    (Caruana et al. 2006). With `num_bags` 1, or few members, there is one bag of all.
    """
    if objective is Objective.NLL:
        values_MNK, labels_N = nll_columns(values_MNK, labels_N, averaging)
    num_members = len(values_MNK)
    bag_size = max(round(bag_share * num_members), _SMALLEST_BAG)
    if num_bags == 1 or bag_size >= num_members:
        return _one_bag(values_MNK, labels_N, averaging, objective, num_rounds)
    rng = np.random.default_rng(seed)
    weights_M = np.zeros(num_members)
    for _ in range(num_bags):
        bag = np.sort(rng.permutation(num_members)[:bag_size])
        weights_M[bag] += _one_bag(values_MNK[bag], labels_N, averaging, objective, num_rounds)
    return _trimmed(weights_M / num_bags)


def uniform_top_k(
    values_MNK: Floats, labels_N: NDArray[Any], averaging: Averaging, *, objective: Objective = Objective.NLL
) -> Floats:
    """Equal weights_M for the best k members, with the k that is best on the rows."""
    ranked = ranked_members(values_MNK, labels_N, averaging, objective)
    candidates = []
    for count in range(1, len(ranked) + 1):
        weights_M = np.zeros(len(values_MNK))
        weights_M[ranked[:count]] = 1 / count
        candidates.append(weights_M)
    return min(candidates, key=lambda one: _loss(values_MNK, one, labels_N, averaging, objective))


def least_nll_weights(values_MNK: Floats, labels_N: NDArray[Any], averaging: Averaging) -> Floats:
    """The weights_M >= 0 of sum 1 with the least NLL: convex for both averaging rules, so a local search finds it."""
    own_MN = values_MNK[:, np.arange(len(labels_N)), labels_N]
    if averaging is Averaging.PROBABILITIES:
        return _trimmed(_mixture_weights(own_MN))
    num_members = len(values_MNK)

    def loss_and_gradient(weights_M: Floats) -> tuple[float, Floats]:
        joint_NK = np.tensordot(weights_M, values_MNK, axes=1)
        expected_MN = np.einsum("mnk,nk->mn", values_MNK, softmax(joint_NK, axis=1))
        return mean_nll(joint_NK, labels_N), np.asarray((expected_MN - own_MN).mean(axis=1))

    found = minimize(
        loss_and_gradient,
        np.full(num_members, 1 / num_members),
        jac=True,
        method="SLSQP",
        bounds=[(0.0, 1.0)] * num_members,
        constraints={"type": "eq", "fun": lambda weights_M: weights_M.sum() - 1.0},
        options={"maxiter": 200, "ftol": 1e-10},
    )
    return _trimmed(found.x)


def nll_columns(
    values_MNK: Floats, labels_N: NDArray[Any], averaging: Averaging
) -> tuple[Floats, NDArray[Any]]:
    """Values and labels of the same NLL, with fewer columns where the rule allows.

    Of averaged probabilities only those of the labels count, so that a selection is as many times faster as there
    are classes.
    """
    if averaging is Averaging.LOGITS:
        return values_MNK, labels_N
    own_MN1 = np.take_along_axis(values_MNK, labels_N[None, :, None], axis=2)
    return own_MN1, np.zeros_like(labels_N)


def ranked_members(
    values_MNK: Floats, labels_N: NDArray[Any], averaging: Averaging, objective: Objective
) -> list[int]:
    """The members from the best one alone to the worst."""
    alone = np.eye(len(values_MNK))
    losses = [_loss(values_MNK, weights_M, labels_N, averaging, objective) for weights_M in alone]
    return sorted(range(len(values_MNK)), key=lambda member: losses[member])


def error_overlap(values_MNK: Floats, labels_N: NDArray[Any]) -> Floats:
    """For each two members, the rows that both get wrong as a share of those that either does; 1 on the diagonal."""
    wrong_MN = values_MNK.argmax(axis=2) != labels_N
    both_MM = (wrong_MN[:, None] & wrong_MN[None]).sum(axis=2)
    either_MM = (wrong_MN[:, None] | wrong_MN[None]).sum(axis=2)
    overlap_MM: Floats = np.where(either_MM > 0, both_MM / np.maximum(either_MM, 1), 1.0)
    return overlap_MM


def _likeliest_temperature(nll: Callable[[float], float]) -> float:
    found = minimize_scalar(
        lambda log_temperature: nll(float(np.exp(log_temperature))),
        bounds=_LOG_TEMPERATURES,
        method="bounded",
        options={"xatol": 1e-3},
    )
    return float(np.exp(found.x))


def _mixture_weights(own_MN: Floats) -> Floats:
    """The weights_M of the mixture that makes the labels likeliest, by members' probabilities of them.

    Expectation maximisation (Dempster et al. 1977): no step raises the NLL, however sure members are. As the logarithm
    is concave, the NLL is above the least by no more than the largest gain is above 1.
    """
    # What members have in common in a row moves no weight; without it no likelihood is too small to divide by.
    relative_MN = np.maximum(own_MN, _TINY)
    relative_MN /= relative_MN.max(axis=0)
    num_members, num_rows = own_MN.shape
    weights_M = np.full(num_members, 1 / num_members)
    for _ in range(_MAX_STEPS):
        gains_M = relative_MN @ (1 / (weights_M @ relative_MN)) / num_rows
        weights_M = weights_M * gains_M
        if gains_M.max() < 1 + _NLL_TOLERANCE:
            break
    return np.asarray(weights_M)


def _one_bag(
    values_MNK: Floats, labels_N: NDArray[Any], averaging: Averaging, objective: Objective, num_rounds: int
) -> Floats:
    counts_M = (uniform_top_k(values_MNK, labels_N, averaging, objective=objective) > 0).astype(np.float64)
    mean = _GrowingMean(values_MNK, labels_N, averaging, objective, counts_M)
    best_loss, best_counts_M = mean.loss(), mean.counts_M.copy()
    while mean.counts_M.sum() < num_rounds:
        loss = mean.add_best()
        if loss < best_loss:
            best_loss, best_counts_M = loss, mean.counts_M.copy()
    return np.asarray(best_counts_M / best_counts_M.sum())


class _GrowingMean:
    """The mean of members that come in one by one, with replacement: the one that makes its loss smallest.

    What breaks ties is looked at where there is one.
    """

    def __init__(
        self,
        values_MNK: Floats,
        labels_N: NDArray[Any],
        averaging: Averaging,
        objective: Objective,
        counts_M: Floats,
    ) -> None:
        self.counts_M = counts_M
        self._values_MNK, self._labels_N, self._averaging = values_MNK, labels_N, averaging
        self._sums_NK = np.tensordot(counts_M, values_MNK, axes=1)
        by_nll = objective is Objective.NLL
        self._first, self._second = (self._nll, self._errors) if by_nll else (self._errors, self._nll)
        # A mean of members that give one answer gives it too, so errors move in the other rows alone.
        answers_MN = values_MNK.argmax(axis=2)
        is_open_N = (answers_MN != answers_MN[0]).any(axis=0)
        # Their values are not kept: they may be as many as all.
        self._open_O = np.flatnonzero(is_open_N)
        self._num_settled_errors = int((answers_MN[0] != labels_N)[~is_open_N].sum())

    def loss(self) -> _Loss:
        """The loss of the mean as it is."""
        return self._first(None), self._second(None)

    def add_best(self) -> _Loss:
        """Take in the member with which the loss is smallest, and say how large it is."""
        firsts = [self._first(member) for member in range(len(self._values_MNK))]
        least = min(firsts)
        tied = [member for member, first in enumerate(firsts) if first == least]
        second, member = min((self._second(member), member) for member in tied)
        self.counts_M[member] += 1
        self._sums_NK += self._values_MNK[member]
        return least, second

    def _nll(self, member: int | None) -> float:
        return _nll_of(self._mean(member, slice(None)), self._labels_N, self._averaging)

    def _errors(self, member: int | None) -> float:
        answers_O = self._mean(member, self._open_O).argmax(axis=1)
        num_open_errors = int((answers_O != self._labels_N[self._open_O]).sum())
        return (self._num_settled_errors + num_open_errors) / len(self._labels_N)

    def _mean(self, member: int | None, rows: slice | NDArray[Any]) -> Floats:
        size = self.counts_M.sum()
        if member is None:
            return np.asarray(self._sums_NK[rows] / size)
        return np.asarray((self._sums_NK[rows] + self._values_MNK[member][rows]) / (size + 1))


def _loss(
    values_MNK: Floats, weights_M: Floats, labels_N: NDArray[Any], averaging: Averaging, objective: Objective
) -> _Loss:
    joint_NK = np.tensordot(weights_M, values_MNK, axes=1)
    nll, errors = _nll_of(joint_NK, labels_N, averaging), 1 - top1(joint_NK, labels_N)
    return (nll, errors) if objective is Objective.NLL else (errors, nll)


def _nll_of(joint_NK: Floats, labels_N: NDArray[Any], averaging: Averaging) -> float:
    """The mean negative log-likelihood of joint values that are not logarithms yet where probabilities are averaged."""
    if averaging is Averaging.LOGITS:
        return mean_nll(joint_NK, labels_N)
    own_N = joint_NK[np.arange(len(labels_N)), labels_N]
    return float(-np.log(np.maximum(own_N, _TINY)).mean())


def _trimmed(weights_M: Floats) -> Floats:
    """Without the members whose weight is next to nothing, and of sum 1 again."""
    kept_M = np.where(weights_M >= _LEAST_WEIGHT, weights_M, 0.0)
    if not kept_M.sum() > 0:
        raise DataError("no weights could be found", next_step="look at the members' predictions")
    return np.asarray(kept_M / kept_M.sum())
