"""Learning curves: the error of a classifier against its images, as a power law with bootstrap intervals.

    error(n) = floor + scale * n ** -exponent

n counts training images of each class. The form is the one that fits best across tasks (Hestness et al. 2017,
arXiv:1712.00409; Viering and Loog 2021, arXiv:2103.10948). A fit alone is too sure of itself beyond its last point:
with a floor of zero it promises too much, with a free one often too little. So half of the resamples are
fitted with each, and the interval spans both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from convoy.core.config import StrictModel
from convoy.core.errors import DataError
from convoy.core.statistics import CONFIDENCE, Interval, effective_rows, percentile_interval

Floats = NDArray[np.float64]

# A law of three numbers goes through as many points.
MIN_SIZES = 3
# From nearly flat to what random noise at small n looks like; steps of 3 %.
_EXPONENTS = np.geomspace(0.02, 2.0, 160)
# Of one row right or wrong: keeps the weight of a point finite whose rows are all right.
_PSEUDO_COUNT = 0.5
_UNREACHABLE = float("inf")
# So many laws tell how far the resamples differ.
_KEPT_LAWS = 41
_LEAST_ERROR = 1e-9


class PowerLaw(StrictModel):
    """The three numbers of a curve: errors in [0, 1]."""

    floor: float
    scale: float
    exponent: float

    def top1(self, images_per_class: float) -> float:
        """The accuracy that the law gives, in [0, 1]."""
        return float(np.clip(1 - self.floor - self.scale * images_per_class**-self.exponent, 0.0, 1.0))

    def fall(self, first: float, last: float) -> float:
        """The error at `last` images a class over that at `first`, in (0, 1]."""
        before, after = (max(1 - self.top1(images), _LEAST_ERROR) for images in (first, last))
        return min(after / before, 1.0)


class Shrink(StrictModel):
    """By what errors fall with more images: the factor, and the standard deviation of its logarithm."""

    factor: float = Field(default=1.0, gt=0, le=1)
    spread: float = Field(default=0.0, ge=0)


# As many images as were measured.
AS_MEASURED = Shrink()


class CurvePoint(StrictModel):
    """A measured point: the mean top-1 of `repeats` fits, each on other images, judged on the same rows."""

    images_per_class: float
    top1: float
    repeats: int


class ForecastPoint(StrictModel):
    """What the curve promises at `factor` times the images of its last point."""

    factor: float
    images_per_class: float
    top1: Interval


class ImagesNeeded(StrictModel):
    """Images of each class that reach a top-1: null where the law, or the bound of the interval, never does."""

    top1: float
    images_per_class: float | None
    low: float | None
    high: float | None


class LearningCurve(StrictModel):
    """Measured points, the law through them (of the median resample), and what it promises.

    `laws` are those of some resamples, evenly spaced in the order of their promise; the middle one is `law`.
    """

    points: list[CurvePoint]
    law: PowerLaw
    laws: list[PowerLaw]
    forecast: list[ForecastPoint]
    needed: ImagesNeeded | None = None

    def shrink(self, images_per_class: float) -> Shrink:
        """By what the error falls from the last point to so many images a class; not at all where they are fewer."""
        last = self.points[-1].images_per_class
        ahead = max(images_per_class, last)
        falls_L = np.array([law.fall(last, ahead) for law in self.laws])
        return Shrink(factor=self.law.fall(last, ahead), spread=float(np.log(falls_L).std()))


@dataclass(frozen=True, slots=True, eq=False)
class CurveSample:
    """What one size gave: `correct_SN` says for each repeat, and each judged row, whether it was right."""

    images_per_class: float
    correct_SN: NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class _Laws:
    """One law a resample."""

    floor_R: Floats
    scale_R: Floats
    exponent_R: Floats

    def error_R(self, images_per_class: float) -> Floats:
        return np.clip(self.floor_R + self.scale_R * images_per_class**-self.exponent_R, 0.0, 1.0)

    def needed_R(self, error: float) -> Floats:
        """Images a class that bring the error down so far; infinity where the floor is above it."""
        room_R = error - self.floor_R
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            needed_R = (self.scale_R / np.maximum(room_R, 1e-12)) ** (1 / self.exponent_R)
        return np.where(room_R > 0, needed_R, _UNREACHABLE)


def fit_curve(
    samples: Sequence[CurveSample],
    *,
    weights_N: Floats | None = None,
    factors: Sequence[float] = (1.0, 2.0, 4.0),
    wanted_top1: float | None = None,
    num_resamples: int = 1000,
    seed: int = 0,
) -> LearningCurve:
    """The curve through samples of growing size, and its forecast at multiples of the last one's images.

    The judged rows, each of which counts by its weight, are resampled jointly for all sizes, and the repeats of each
    size among themselves. Raises DataError for fewer than three sizes: a law of three numbers needs as many.
    """
    ordered = sorted(samples, key=lambda sample: sample.images_per_class)
    sizes_P = np.array([sample.images_per_class for sample in ordered])
    if len(np.unique(sizes_P)) < MIN_SIZES or len(np.unique(sizes_P)) < len(sizes_P):
        raise DataError(
            "a learning curve needs three sizes or more, each once",
            where=f"images a class: {sizes_P.tolist()}",
            next_step="raise the images a class, or give more fractions",
        )
    if weights_N is None:
        weights_N = np.ones(ordered[0].correct_SN.shape[1])
    errors_RP = _resampled_errors(ordered, weights_N, num_resamples, np.random.default_rng(seed))
    laws = _fit_both(sizes_P, errors_RP, effective_rows(weights_N))
    last = float(sizes_P[-1])
    kept = _some_laws(laws, last)
    return LearningCurve(
        points=[
            CurvePoint(
                images_per_class=sample.images_per_class,
                top1=weighted_top1(sample, weights_N),
                repeats=len(sample.correct_SN),
            )
            for sample in ordered
        ],
        law=kept[len(kept) // 2],
        laws=kept,
        forecast=[
            ForecastPoint(
                factor=factor,
                images_per_class=factor * last,
                top1=percentile_interval(1 - laws.error_R(factor * last)),
            )
            for factor in factors
        ],
        needed=None if wanted_top1 is None else _needed(laws, wanted_top1),
    )


def weighted_top1(sample: CurveSample, weights_N: Floats) -> float:
    """The mean top-1 of the fits of one size, each judged row counting by its weight."""
    return float((sample.correct_SN * weights_N).sum() / (len(sample.correct_SN) * weights_N.sum()))


def _resampled_errors(
    samples: Sequence[CurveSample], weights_N: Floats, num_resamples: int, random: np.random.Generator
) -> Floats:
    """errors_RP: of each resample of rows and repeats, the error at each size; the first resample is the data."""
    num_rows = samples[0].correct_SN.shape[1]
    counts_RN = random.multinomial(num_rows, np.full(num_rows, 1 / num_rows), size=num_resamples)
    counts_RN[0] = 1
    weights_RN = counts_RN * weights_N
    totals_R1 = weights_RN.sum(axis=1, keepdims=True)
    columns = []
    for sample in samples:
        top1_RS = weights_RN @ sample.correct_SN.T.astype(np.float64) / totals_R1
        num_repeats = len(sample.correct_SN)
        drawn_RS = random.integers(0, num_repeats, size=(num_resamples, num_repeats))
        drawn_RS[0] = np.arange(num_repeats)
        columns.append(1 - np.take_along_axis(top1_RS, drawn_RS, axis=1).mean(axis=1))
    return np.stack(columns, axis=1)


def _fit_both(sizes_P: Floats, errors_RP: Floats, num_rows: float) -> _Laws:
    """Every second resample with a floor of zero, the others with a free one."""
    variance_RP = errors_RP * (1 - errors_RP) / num_rows + _PSEUDO_COUNT / num_rows**2
    weights_P = 1 / variance_RP.mean(axis=0)
    laws = _fit(sizes_P, errors_RP, weights_P)
    without = _fit(sizes_P, errors_RP, weights_P, with_floor=np.zeros(len(errors_RP)))
    is_free_R = np.arange(len(errors_RP)) % 2 == 0
    return _Laws(
        floor_R=np.where(is_free_R, laws.floor_R, 0.0),
        scale_R=np.where(is_free_R, laws.scale_R, without.scale_R),
        exponent_R=np.where(is_free_R, laws.exponent_R, without.exponent_R),
    )


def _fit(sizes_P: Floats, errors_RP: Floats, weights_P: Floats, *, with_floor: Floats | None = None) -> _Laws:
    """Weighted least squares: at each exponent of a grid floor and scale are linear, and not below zero.

    With `with_floor` the floor is given, one for each resample.
    """
    powers_EP = sizes_P[None, :] ** -_EXPONENTS[:, None]
    sum_x_E = powers_EP @ weights_P
    sum_xx_E = powers_EP**2 @ weights_P
    sum_xy_RE = (errors_RP * weights_P) @ powers_EP.T
    sum_y_R1 = (errors_RP @ weights_P)[:, None]
    sum_1 = float(weights_P.sum())
    if with_floor is None:
        spread_E = np.maximum(sum_1 * sum_xx_E - sum_x_E**2, 1e-30)
        scale_RE = (sum_1 * sum_xy_RE - sum_x_E * sum_y_R1) / spread_E
        floor_RE = np.maximum((sum_y_R1 - scale_RE * sum_x_E) / sum_1, 0.0)
    else:
        floor_RE = np.broadcast_to(with_floor[:, None], sum_xy_RE.shape)
    scale_RE = np.maximum((sum_xy_RE - floor_RE * sum_x_E) / sum_xx_E, 0.0)
    # Where nothing falls with n the floor is the mean.
    if with_floor is None:
        floor_RE = np.where(scale_RE > 0, floor_RE, sum_y_R1 / sum_1)
    loss_RE = (
        scale_RE**2 * sum_xx_E
        + 2 * scale_RE * floor_RE * sum_x_E
        + floor_RE**2 * sum_1
        - 2 * scale_RE * sum_xy_RE
        - 2 * floor_RE * sum_y_R1
    )
    best_R = loss_RE.argmin(axis=1)
    rows = np.arange(len(errors_RP))
    return _Laws(floor_RE[rows, best_R], scale_RE[rows, best_R], _EXPONENTS[best_R])


def _some_laws(laws: _Laws, last: float) -> list[PowerLaw]:
    """The laws of resamples at even distances in the order of their promise at four times the images."""
    order = np.argsort(laws.error_R(4 * last))
    places = ((np.arange(_KEPT_LAWS) + 0.5) / _KEPT_LAWS * len(order)).astype(int)
    return [
        PowerLaw(
            floor=float(laws.floor_R[place]),
            scale=float(laws.scale_R[place]),
            exponent=float(laws.exponent_R[place]),
        )
        for place in order[places]
    ]


def _needed(laws: _Laws, wanted_top1: float) -> ImagesNeeded:
    tail = (1 - CONFIDENCE) / 2
    # Not interpolated: between a number and infinity there is no number.
    low, middle, high = np.quantile(
        laws.needed_R(1 - wanted_top1), [tail, 0.5, 1 - tail], method="nearest"
    ).tolist()
    return ImagesNeeded(
        top1=wanted_top1, images_per_class=_finite(middle), low=_finite(low), high=_finite(high)
    )


def _finite(images_per_class: float) -> float | None:
    return float(np.ceil(images_per_class)) if images_per_class < 1e9 else None
