"""Learning curves: laws that were planted are found again, and intervals hold as often as they say."""

from __future__ import annotations

import numpy as np
import pytest

from convoy.core.errors import DataError
from convoy.core.learning_curve import AS_MEASURED, CurveSample, LearningCurve, fit_curve

SIZES = (6, 12, 25, 50, 100, 200)


def planted(
    floor: float, scale: float, exponent: float, *, num_rows: int = 400, repeats: int = 3, seed: int = 0
) -> list[CurveSample]:
    """What fits with these errors get right; rows are as hard for one size as for another."""
    random = np.random.default_rng(seed)
    difficulty_N = random.random(num_rows)
    samples = []
    for size in SIZES:
        error = floor + scale * size**-exponent
        noise_SN = random.normal(0, 0.05, (repeats if size < SIZES[-1] else 1, num_rows))
        samples.append(CurveSample(float(size), difficulty_N + noise_SN > error))
    return samples


def forecast(curve: LearningCurve, factor: float) -> tuple[float, float, float]:
    point = next(one.top1 for one in curve.forecast if one.factor == factor)
    return point.low, point.estimate, point.high


@pytest.mark.parametrize(("floor", "exponent"), [(0.0, 0.5), (0.1, 0.6), (0.0, 0.15)])
def test_a_planted_law_is_continued_to_four_times_the_images(floor: float, exponent: float) -> None:
    curve = fit_curve(planted(floor, 0.9, exponent, num_rows=4000))
    truth = 1 - floor - 0.9 * 800**-exponent
    low, estimate, high = forecast(curve, 4.0)
    assert low <= truth <= high
    assert estimate == pytest.approx(truth, abs=0.04)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    held = 0
    for seed in range(40):
        curve = fit_curve(planted(0.05, 0.8, 0.4, seed=seed), num_resamples=400, seed=seed)
        low, _, high = forecast(curve, 2.0)
        held += low <= 1 - 0.05 - 0.8 * 400**-0.4 <= high
    assert held >= 34


def test_rows_count_by_their_weight() -> None:
    """Nine tenths of the weight follow one law, and half of the rows another."""
    heavy, light = planted(0.0, 0.9, 0.5, num_rows=2000), planted(0.4, 0.5, 0.5, num_rows=2000, seed=1)
    both = [
        CurveSample(one.images_per_class, np.concatenate([one.correct_SN, other.correct_SN], axis=1))
        for one, other in zip(heavy, light, strict=True)
    ]
    curve = fit_curve(both, weights_N=np.repeat([1.8, 0.2], 2000))
    tops = [
        0.9 * one.correct_SN.mean() + 0.1 * other.correct_SN.mean()
        for one, other in zip(heavy, light, strict=True)
    ]
    assert [point.top1 for point in curve.points] == pytest.approx(tops)
    assert curve.law.top1(400) == pytest.approx(1 - 0.04 - 0.86 * 400**-0.5, abs=0.01)


def test_the_images_needed_reach_the_wanted_accuracy() -> None:
    curve = fit_curve(planted(0.0, 0.9, 0.5, num_rows=4000), wanted_top1=0.97)
    assert curve.needed is not None
    assert curve.needed.images_per_class is not None
    assert curve.needed.low is not None
    truth = (0.9 / 0.03) ** 2
    assert curve.needed.low <= truth <= (curve.needed.high or float("inf"))
    assert truth / 2 < curve.needed.images_per_class < truth * 2


def test_what_no_number_of_images_reaches_is_needed_never() -> None:
    curve = fit_curve(planted(0.4, 0.5, 1.0, num_rows=4000), wanted_top1=0.999)
    assert curve.needed is not None
    assert curve.needed.high is None


def test_a_flat_curve_promises_nothing() -> None:
    curve = fit_curve(planted(0.3, 0.0, 1.0, num_rows=4000))
    low, estimate, high = forecast(curve, 4.0)
    assert estimate == pytest.approx(0.7, abs=0.02)
    assert high - low < 0.05


def test_points_are_the_measured_means_in_order_of_size() -> None:
    samples = planted(0.1, 0.8, 0.5)
    curve = fit_curve(samples[::-1])
    assert [point.images_per_class for point in curve.points] == list(SIZES)
    assert curve.points[0].top1 == pytest.approx(samples[0].correct_SN.mean())
    assert [point.repeats for point in curve.points] == [3, 3, 3, 3, 3, 1]


def test_a_law_of_three_numbers_needs_three_sizes() -> None:
    with pytest.raises(DataError, match="three sizes"):
        fit_curve(planted(0.1, 0.8, 0.5)[:2])


def test_equal_samples_give_equal_curves() -> None:
    samples = planted(0.1, 0.8, 0.5)
    assert fit_curve(samples, seed=3) == fit_curve(samples, seed=3)


def test_errors_shrink_as_planted_and_the_further_ahead_the_less_surely() -> None:
    curve = fit_curve(planted(0.0, 0.9, 0.5, num_rows=4000))
    assert curve.law == curve.laws[len(curve.laws) // 2]
    assert curve.shrink(200) == curve.shrink(50) == AS_MEASURED
    near, far = curve.shrink(400), curve.shrink(3200)
    assert near.factor == pytest.approx(2**-0.5, abs=0.04)
    assert far.factor == pytest.approx(16**-0.5, abs=0.1)
    assert 0 < near.spread < far.spread
    assert fit_curve(planted(0.0, 0.9, 0.5, num_rows=200)).shrink(400).spread > 2 * near.spread
