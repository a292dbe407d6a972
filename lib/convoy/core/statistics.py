"""Intervals and paired tests for metrics: what a difference between two models is worth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convoy.core.config import StrictModel
from convoy.core.errors import ConfigError, DataError

# Of intervals whose caller says no other.
CONFIDENCE = 0.95
_SEED = 0

# One binomial draw costs about as much as this many drawn indices.
_INDICES_PER_BINOMIAL = 32
_DRAWS_PER_BLOCK = 1 << 20

# Beyond this many rows the bootstrap of a mean is its normal limit: with a skewness of 10, percentiles then
# differ by less than 0.01 standard errors, and the draws would take minutes.
_NORMAL_LIMIT_ROWS = 1 << 18
# Drawing indices for so many rows takes a third of a second.
_MAX_GAPS_BY_INDEX = 1 << 14


class Interval(StrictModel):
    """An estimate, and the limits of its two-sided interval at `confidence` (0.95 = 95 %)."""

    estimate: float
    low: float
    high: float
    confidence: float


class McNemarResult(StrictModel):
    """A paired comparison of two classifiers on the same rows; p values are two-sided.

    `mid_p` is the one to decide by: `exact_p` is too conservative (Fagerland et al. 2013).
    """

    only_first_correct: int
    only_second_correct: int
    exact_p: float
    mid_p: float


def bootstrap_mean(
    values_N: NDArray[Any], *, num_resamples: int = 2000, confidence: float = CONFIDENCE, seed: int = _SEED
) -> Interval:
    """The percentile bootstrap interval of a mean (Efron and Tibshirani 1993, ch. 13), equal for equal seeds.

    A resample only matters through how often it holds each distinct value, and these counts are one
    multinomial draw. So a rate over 0/1 outcomes costs one binomial draw a resample whatever N; values that
    are mostly distinct are resampled by index, in bounded memory, and beyond 2^18 rows by the normal limit.
    Where all rows agree the interval has no width: report `wilson_interval` for rates near 0 or 1.
    """
    wide_N = _sample(values_N)
    _check_confidence(confidence)
    if num_resamples < 1:
        raise ConfigError("a bootstrap needs at least one resample", where=f"num_resamples={num_resamples}")
    distinct_M, counts_M = np.unique(wide_N, return_counts=True)
    random = np.random.default_rng(seed)
    mean = float(wide_N.mean())
    if len(distinct_M) * _INDICES_PER_BINOMIAL <= len(wide_N) or len(distinct_M) == 1:
        means_R = _means_by_counts(distinct_M, counts_M, num_resamples, random)
    elif len(wide_N) <= _NORMAL_LIMIT_ROWS:
        means_R = _means_by_index(wide_N, num_resamples, random)
    else:
        z = -NormalDist().inv_cdf((1.0 - confidence) / 2.0)
        margin = z * float(wide_N.std()) / math.sqrt(len(wide_N))
        return Interval(estimate=mean, low=mean - margin, high=mean + margin, confidence=confidence)
    return percentile_interval(means_R, confidence=confidence, estimate=mean)


def percentile_interval(
    values_R: NDArray[np.float64], *, confidence: float = CONFIDENCE, estimate: float | None = None
) -> Interval:
    """The interval that holds so large a share of drawn values; the estimate is their median where none is given."""
    tail = (1.0 - confidence) / 2.0
    low, middle, high = np.quantile(values_R, [tail, 0.5, 1.0 - tail]).tolist()
    return Interval(
        estimate=middle if estimate is None else estimate, low=low, high=high, confidence=confidence
    )


def bootstrap_calibration_error(
    gaps_N: NDArray[Any], bins_N: NDArray[np.integer[Any]], *, num_resamples: int = 2000
) -> Interval:
    """The basic bootstrap interval (Davison and Hinkley 1997, 5.2) of an expected calibration error.

    A row's gap is 1 or 0, for right or wrong, less its confidence; the error is the sum over bins of the absolute
    total of their gaps, a row. Chance makes it too large in every sample, and larger again in a sample of that, so
    the percentiles are turned around the estimate. Beyond 2^14 rows the totals of the bins are drawn from their normal
    limit.
    """
    gaps_N = _sample(gaps_N)
    num_rows, num_bins = len(gaps_N), int(bins_N.max()) + 1
    random = np.random.default_rng(_SEED)
    totals_B = np.bincount(bins_N, gaps_N, num_bins)
    if num_rows <= _MAX_GAPS_BY_INDEX:
        errors_R = _errors_by_index(gaps_N, bins_N, num_resamples, random)
    else:
        deviations_B = np.sqrt(np.bincount(bins_N, gaps_N**2, num_bins) - totals_B**2 / num_rows)
        totals_RB = random.normal(totals_B, deviations_B, (num_resamples, num_bins))
        errors_R = np.abs(totals_RB).sum(axis=1) / num_rows
    drawn = percentile_interval(errors_R)
    estimate = float(np.abs(totals_B).sum()) / num_rows
    # Turned around, limits may lie where no error can.
    low, high = (min(max(0.0, 2 * estimate - limit), 1.0) for limit in (drawn.high, drawn.low))
    return Interval(
        estimate=estimate, low=min(low, estimate), high=max(high, estimate), confidence=CONFIDENCE
    )


def bootstrap_difference(first_N: NDArray[Any], second_N: NDArray[Any]) -> Interval:
    """The paired bootstrap interval of mean(first) - mean(second), over the same rows in the same order.

    Rows are resampled as pairs, which is the bootstrap of the mean of the rows' differences.
    """
    first, second = _sample(first_N), _sample(second_N)
    _check_paired(first, second)
    return bootstrap_mean(first - second)


def effective_rows(weights_N: NDArray[Any]) -> float:
    """How many rows of equal weight tell as much of a mean as these (Kish 1965, Survey Sampling): 1 at least."""
    total = weights_N.sum()
    # Rounding may say less of a single row.
    return max(float(total * (total / (weights_N**2).sum())), 1.0)


def effective_counts(is_right_N: NDArray[np.bool_], weights_N: NDArray[Any]) -> tuple[float, float]:
    """How many rows are right, and of how many, counted in `effective_rows`: the rate is the weighted one."""
    num_rows, total = effective_rows(weights_N), weights_N.sum()
    num_right = float((weights_N * is_right_N).sum() * (total / (weights_N**2).sum()))
    return min(num_right, num_rows), num_rows


def wilson_interval(num_successes: float, num_trials: float, *, confidence: float = CONFIDENCE) -> Interval:
    """The score interval of a proportion (Wilson 1927), without continuity correction; good near 0 and 1.

    Numbers of weighted rows are those of `effective_counts`.
    """
    if num_trials < 1 or not 0 <= num_successes <= num_trials:
        raise DataError("a proportion needs trials", where=f"{num_successes} of {num_trials}")
    _check_confidence(confidence)
    z = NormalDist().inv_cdf(0.5 + confidence / 2.0)
    rate = num_successes / num_trials
    shrink = 1.0 + z * z / num_trials
    center = (rate + z * z / (2.0 * num_trials)) / shrink
    variance = rate * (1.0 - rate) / num_trials + z * z / (4.0 * num_trials**2)
    margin = z * math.sqrt(variance) / shrink
    # At 0 and at all successes the limit is the rate itself; rounding must not cross it.
    low, high = min(max(0.0, center - margin), rate), max(min(1.0, center + margin), rate)
    return Interval(estimate=rate, low=low, high=high, confidence=confidence)


def paired_rate_difference(
    first_correct_N: NDArray[np.bool_], second_correct_N: NDArray[np.bool_]
) -> Interval:
    """The interval of the difference of two rates over the same rows (Bonett and Price 2012): first - second.

    It counts one row more of either kind of difference, so it keeps a width where the two hardly ever differ and a
    bootstrap has none: few rows show little, also if all of them agree.
    """
    first, second = np.asarray(first_correct_N, np.bool_), np.asarray(second_correct_N, np.bool_)
    _check_paired(first, second)
    only_first = int(np.count_nonzero(first & ~second))
    only_second = int(np.count_nonzero(second & ~first))
    estimate = (only_first - only_second) / len(first)
    rate_first, rate_second = (only_first + 1) / (len(first) + 2), (only_second + 1) / (len(first) + 2)
    center = rate_first - rate_second
    margin = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2.0) * math.sqrt(
        (rate_first + rate_second - center**2) / (len(first) + 2)
    )
    low, high = max(-1.0, center - margin), min(1.0, center + margin)
    return Interval(
        estimate=estimate, low=min(low, estimate), high=max(high, estimate), confidence=CONFIDENCE
    )


def mcnemar_test(first_correct_N: NDArray[np.bool_], second_correct_N: NDArray[np.bool_]) -> McNemarResult:
    """Whether two classifiers differ in accuracy, from the rows that only one of them gets right.

    Exact conditional and mid-p tests of Fagerland, Lydersen and Laake (2013); p = 1 without such rows.
    """
    first, second = np.asarray(first_correct_N, np.bool_), np.asarray(second_correct_N, np.bool_)
    _check_paired(first, second)
    only_first = int(np.count_nonzero(first & ~second))
    only_second = int(np.count_nonzero(second & ~first))
    fewer, discordant = min(only_first, only_second), only_first + only_second
    point, tail = _fair_binomial(fewer, discordant)
    if only_first == only_second:
        exact_p = 1.0
        mid_p = 1.0 - point / 2.0 if discordant else 1.0
    else:
        exact_p = min(1.0, 2.0 * tail)
        mid_p = 2.0 * tail - point
    return McNemarResult(
        only_first_correct=only_first, only_second_correct=only_second, exact_p=exact_p, mid_p=mid_p
    )


def rise_test(num_more: int, num_fewer: int) -> float:
    """The one-sided mid-p value that something rose: of the rows that changed, so many began it and so many ended it.

    One side of McNemar's test (see `mcnemar_test`); 1/2 where as many began it as ended it, or none changed.
    """
    if num_more < num_fewer:
        return 1.0 - rise_test(num_fewer, num_more)
    if num_more == num_fewer:
        return 0.5
    point, tail = _fair_binomial(num_fewer, num_more + num_fewer)
    return tail - point / 2.0


def holm_adjusted(p_values: Sequence[float]) -> list[float]:
    """The p values of several tests, adjusted for their number (Holm 1979): they hold whichever of them one picks."""
    adjusted, highest = [1.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda one: p_values[one])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted


def _fair_binomial(successes: int, trials: int) -> tuple[float, float]:
    """P(X = successes) and P(X <= successes) for X ~ Binomial(trials, 1/2); 0 where float64 underflows."""
    log_ways = math.lgamma(trials + 1) - math.lgamma(successes + 1) - math.lgamma(trials - successes + 1)
    point = math.exp(log_ways - trials * math.log(2.0))
    lower = np.arange(successes, 0, -1, dtype=np.float64)
    ratios_to_point = np.cumprod(lower / (trials - lower + 1.0))
    return point, point * (1.0 + float(ratios_to_point.sum()))


def _means_by_counts(
    distinct_M: NDArray[np.float64],
    counts_M: NDArray[np.int64],
    num_resamples: int,
    random: np.random.Generator,
) -> NDArray[np.float64]:
    num_rows = int(counts_M.sum())
    per_block = max(1, _DRAWS_PER_BLOCK // len(distinct_M))
    blocks = []
    for start in range(0, num_resamples, per_block):
        size = min(per_block, num_resamples - start)
        blocks.append(random.multinomial(num_rows, counts_M / num_rows, size=size) @ distinct_M / num_rows)
    return np.concatenate(blocks)


def _means_by_index(
    values_N: NDArray[np.float64], num_resamples: int, random: np.random.Generator
) -> NDArray[np.float64]:
    per_block = max(1, _DRAWS_PER_BLOCK // len(values_N))
    blocks = []
    for start in range(0, num_resamples, per_block):
        shape = (min(per_block, num_resamples - start), len(values_N))
        indices_RN = random.integers(0, len(values_N), size=shape, dtype=np.int32)
        blocks.append(values_N[indices_RN].mean(axis=1))
    return np.concatenate(blocks)


def _errors_by_index(
    gaps_N: NDArray[np.float64],
    bins_N: NDArray[np.integer[Any]],
    num_resamples: int,
    random: np.random.Generator,
) -> NDArray[np.float64]:
    num_rows, num_bins = len(gaps_N), int(bins_N.max()) + 1
    errors_R = np.empty(num_resamples)
    for resample in range(num_resamples):
        indices_N = random.integers(0, num_rows, size=num_rows, dtype=np.int32)
        errors_R[resample] = np.abs(np.bincount(bins_N[indices_N], gaps_N[indices_N], num_bins)).sum()
    return errors_R / num_rows


def _sample(values_N: NDArray[Any]) -> NDArray[np.float64]:
    wide_N = np.asarray(values_N).astype(np.float64)
    if wide_N.ndim != 1 or wide_N.size == 0 or not np.isfinite(wide_N).all():
        raise DataError("a sample must be a non-empty row of finite numbers", where=f"shape {wide_N.shape}")
    return wide_N


def _check_paired(first_N: NDArray[Any], second_N: NDArray[Any]) -> None:
    if first_N.shape != second_N.shape or first_N.ndim != 1:
        raise DataError(
            "a paired comparison needs the same rows on both sides",
            where=f"{first_N.shape} and {second_N.shape}",
            next_step="join the two predictions by sample_id first",
        )


def _check_confidence(confidence: float) -> None:
    if not 0.0 < confidence < 1.0:
        raise ConfigError("a confidence lies between 0 and 1", where=f"confidence={confidence}")
