import math

import numpy as np
import pytest
from scipy import stats

from convoy.core.errors import ConfigError, DataError
from convoy.core.statistics import (
    bootstrap_calibration_error,
    bootstrap_difference,
    bootstrap_mean,
    effective_counts,
    effective_rows,
    holm_adjusted,
    mcnemar_test,
    paired_rate_difference,
    percentile_interval,
    rise_test,
    wilson_interval,
)


def outcomes(num_correct, num_rows):
    return np.arange(num_rows) < num_correct


def discordant(only_first, only_second, both=5):
    first = np.array([True] * only_first + [False] * only_second + [True] * both)
    second = np.array([False] * only_first + [True] * only_second + [True] * both)
    return first, second


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (10, 10), (3, 17), (8650, 10_000), (1, 1)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_wilson_agrees_with_scipy(successes, trials, confidence):
    interval = wilson_interval(successes, trials, confidence=confidence)
    expected = stats.binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert interval.low <= interval.estimate <= interval.high


def test_rows_of_equal_weight_count_as_they_are():
    is_right_N = np.arange(49) < 31
    assert effective_counts(is_right_N, np.ones(49)) == (31, 49)
    assert effective_counts(np.ones(49, bool), np.full(49, 0.3))[0] == effective_rows(np.full(49, 0.3))


def test_a_single_row_is_one_row_whatever_it_weighs():
    """0.1 * (0.1 / 0.1 ** 2) is less than 1."""
    for weight in (0.1, 0.3, 1.0, 7.0):
        num_right, num_rows = effective_counts(np.ones(1, bool), np.array([weight]))
        assert 1 <= num_rows == effective_rows(np.array([weight])) == pytest.approx(1)
        assert wilson_interval(num_right, num_rows).estimate == pytest.approx(1)


def test_the_interval_of_weighted_rows_holds_their_rate_as_often_as_it_says():
    """Of two strata one has nine tenths of all rows, and half of those that are looked at."""
    random, held = np.random.default_rng(0), 0
    weights_N = np.repeat([1.8, 0.2], 100)
    for _ in range(1000):
        is_right_N = random.random(200) < np.repeat([0.9, 0.5], 100)
        interval = wilson_interval(*effective_counts(is_right_N, weights_N))
        assert interval.estimate == pytest.approx(np.average(is_right_N, weights=weights_N))
        held += interval.low <= 0.9 * 0.9 + 0.1 * 0.5 <= interval.high
    assert 935 < held < 985


@pytest.mark.parametrize(
    ("of_first", "of_second"), [(0.0, 0.0), (0.02, 0.02), (0.05, 0.15), (0.3, 0.2), (0.0, 0.4)]
)
def test_the_interval_of_a_paired_difference_holds_the_truth_as_often_as_it_says(of_first, of_second):
    num_rows = 40
    held = 0.0
    for first in range(num_rows + 1):
        for second in range(num_rows + 1 - first):
            interval = paired_rate_difference(*discordant(first, second, both=num_rows - first - second))
            assert interval.low <= interval.estimate <= interval.high
            chance = stats.multinomial.pmf(
                [first, second, num_rows - first - second],
                num_rows,
                [of_first, of_second, 1 - of_first - of_second],
            )
            held += chance * (interval.low <= of_first - of_second <= interval.high)
    assert held > 0.93


def test_few_rows_on_which_two_models_agree_show_little():
    widths = [paired_rate_difference(*discordant(0, 0, both=rows)).high for rows in (20, 200, 2000)]
    assert widths == pytest.approx([1.96 * math.sqrt(2) / (rows + 2) for rows in (20, 200, 2000)], rel=1e-3)


@pytest.mark.parametrize("pair", [(0, 0), (1, 0), (1, 7), (5, 5), (40, 61), (700, 820), (0, 3000)])
def test_mcnemar_agrees_with_scipys_binomial(pair):
    result = mcnemar_test(*discordant(*pair))
    fewer, trials = min(pair), sum(pair)
    exact = stats.binomtest(fewer, trials).pvalue if trials else 1.0
    point = stats.binom.pmf(fewer, trials, 0.5)
    mid = 2 * stats.binom.cdf(fewer, trials, 0.5) - point if pair[0] != pair[1] else 1 - point / 2
    assert result.exact_p == pytest.approx(exact, rel=1e-9, abs=1e-300)
    assert result.mid_p == pytest.approx(mid if trials else 1.0, rel=1e-9, abs=1e-300)
    assert (result.only_first_correct, result.only_second_correct) == pair


def test_mcnemar_gives_the_published_example():
    # Fagerland et al. 2013, table 1: seven against one; exact 0.0703, mid-p 0.0391.
    result = mcnemar_test(*discordant(1, 7, both=13))
    assert round(result.exact_p, 4) == 0.0703
    assert round(result.mid_p, 4) == 0.0391


def test_mcnemar_handles_millions_of_rows():
    result = mcnemar_test(*discordant(500_000, 501_000))
    assert result.exact_p == pytest.approx(stats.binomtest(500_000, 1_001_000).pvalue, rel=1e-6)


@pytest.mark.parametrize(
    "pair", [(0, 0), (3, 0), (0, 3), (7, 1), (4, 4), (40, 61), (61, 40), (5000, 0), (0, 5000)]
)
def test_rise_is_one_side_of_mcnemar(pair):
    more, fewer = pair
    expected = stats.binom.sf(more, more + fewer, 0.5) + stats.binom.pmf(more, more + fewer, 0.5) / 2
    assert rise_test(*pair) == pytest.approx(expected, rel=1e-9, abs=1e-300)
    if more > fewer:
        assert 2 * rise_test(*pair) == pytest.approx(mcnemar_test(*discordant(*pair)).mid_p)


def test_holm_gives_the_published_example():
    # The worked example of Holm's procedure with four tests: 0.01, 0.04, 0.03, 0.005.
    assert holm_adjusted([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_keeps_order_and_never_exceeds_one():
    assert holm_adjusted([]) == []
    assert holm_adjusted([0.7, 0.6]) == [1.0, 1.0]
    assert holm_adjusted([0.02]) == [0.02]
    adjusted = holm_adjusted([0.001, 0.5, 0.02, 0.011])
    assert adjusted == pytest.approx([0.004, 0.5, 0.04, 0.033])


def test_the_bootstrap_of_a_rate_is_a_binomial_draw():
    interval = bootstrap_mean(outcomes(860, 1000), num_resamples=50_000)
    expected = stats.binom(1000, 0.86).ppf([0.025, 0.975]) / 1000
    assert (interval.low, interval.high) == pytest.approx(tuple(expected), abs=1.01e-3)
    assert interval.estimate == 0.86


@pytest.mark.parametrize("num_rows", [30, 3000, 400_000])
def test_the_bootstrap_of_skewed_values_agrees_with_scipy_or_its_normal_limit(num_rows):
    values = np.random.default_rng(1).exponential(size=num_rows).astype(np.float32)
    interval = bootstrap_mean(values, num_resamples=4000)
    if num_rows <= 3000:
        expected = stats.bootstrap(
            (values.astype(np.float64),), np.mean, n_resamples=4000, method="percentile", batch=500, rng=2
        ).confidence_interval
        low, high = expected.low, expected.high
    else:
        low, high = stats.norm(values.mean(), stats.sem(values, ddof=0)).ppf([0.025, 0.975])
    width = high - low
    assert interval.low == pytest.approx(low, abs=0.05 * width)
    assert interval.high == pytest.approx(high, abs=0.05 * width)


def test_the_normal_limit_continues_the_drawn_interval():
    values = np.random.default_rng(3).exponential(size=(1 << 18) + 1)
    drawn, limit = bootstrap_mean(values[:-1], num_resamples=500), bootstrap_mean(values)
    assert limit.high - limit.low == pytest.approx(drawn.high - drawn.low, rel=0.15)


def test_intervals_cover_the_true_mean_about_as_often_as_they_say():
    random = np.random.default_rng(4)
    hits = 0
    for trial in range(300):
        interval = bootstrap_mean(random.random(200) < 0.7, num_resamples=400, seed=trial)
        hits += interval.low <= 0.7 <= interval.high
    assert 0.90 <= hits / 300 <= 0.985


def overconfident_rows(num_rows, excess, rng):
    """Gaps and bins of rows that are right less often than their confidence says, by so much in every bin."""
    confidences = rng.uniform(0.4, 1.0, num_rows)
    is_right = rng.uniform(size=num_rows) < confidences - excess
    return is_right - confidences, np.minimum((confidences * 15).astype(np.int64), 14)


@pytest.mark.parametrize("num_rows", [1000, 20_000])
def test_the_interval_of_a_calibration_error_holds_the_truth_about_as_often_as_it_says(num_rows):
    rng = np.random.default_rng(0)
    samples = [overconfident_rows(num_rows, 0.1, rng) for _ in range(60)]
    intervals = [bootstrap_calibration_error(*rows, num_resamples=300) for rows in samples]
    assert 0.85 <= np.mean([one.low <= 0.1 <= one.high for one in intervals]) <= 1.0
    assert max(one.high - one.low for one in intervals) < 5 / math.sqrt(num_rows)


def test_chance_alone_does_not_look_like_a_calibration_error():
    rng = np.random.default_rng(3)
    intervals = [
        bootstrap_calibration_error(*overconfident_rows(300, 0.0, rng), num_resamples=300) for _ in range(40)
    ]
    assert np.mean([one.estimate for one in intervals]) > 0.04
    assert np.mean([one.low for one in intervals]) < 0.01
    assert all(0 <= one.low < one.estimate <= one.high for one in intervals)


@pytest.mark.parametrize("num_rows", [20, 20_000])
def test_no_calibration_error_is_above_1(num_rows):
    """Nearly all rows are wrong for sure."""
    gaps = np.where(np.arange(num_rows) % 20 == 0, 0.0, -1.0)
    interval = bootstrap_calibration_error(gaps, np.zeros(num_rows, np.int64))
    assert interval.estimate == 0.95
    assert 0.8 < interval.low < 0.95 < interval.high <= 1.0


def test_the_normal_limit_of_a_calibration_error_continues_the_drawn_one(monkeypatch):
    gaps, bins = overconfident_rows(10_000, 0.05, np.random.default_rng(1))
    drawn = bootstrap_calibration_error(gaps, bins)
    monkeypatch.setattr("convoy.core.statistics._MAX_GAPS_BY_INDEX", 0)
    limit = bootstrap_calibration_error(gaps, bins)
    assert limit.estimate == drawn.estimate
    assert (limit.low, limit.high) == pytest.approx((drawn.low, drawn.high), abs=0.002)


def test_equal_seeds_give_equal_intervals_and_others_do_not():
    values = np.random.default_rng(5).normal(size=500)
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1)
    assert bootstrap_mean(values, seed=1) != bootstrap_mean(values, seed=2)


def test_the_paired_difference_uses_the_pairing():
    random = np.random.default_rng(6)
    hardness = random.random(4000)
    first, second = hardness < 0.80, hardness < 0.79
    paired = bootstrap_difference(first, second)
    assert paired.estimate == pytest.approx(first.mean() - second.mean())
    assert paired.low > 0.0  # a point of difference on the same rows is certain,
    single = bootstrap_mean(first)
    assert single.high - single.low > 2 * (paired.high - paired.low)  # though each rate alone is not


def test_a_percentile_interval_holds_its_share_around_the_median_or_what_is_given():
    values = np.arange(1001.0)
    drawn = percentile_interval(values, confidence=0.9)
    assert (drawn.low, drawn.estimate, drawn.high) == pytest.approx((50, 500, 950))
    assert percentile_interval(values, confidence=0.9, estimate=480.0) == drawn.model_copy(
        update={"estimate": 480.0}
    )


def test_a_sample_without_spread_has_an_interval_without_width():
    interval = bootstrap_mean(np.ones(7))
    assert (interval.low, interval.estimate, interval.high) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [[1.0], [2.0]]])
def test_samples_that_have_no_mean_are_refused(values):
    with pytest.raises(DataError):
        bootstrap_mean(np.array(values))


def test_bad_requests_are_refused():
    with pytest.raises(ConfigError):
        bootstrap_mean(np.ones(3), confidence=95)
    with pytest.raises(ConfigError):
        bootstrap_mean(np.ones(3), num_resamples=0)
    with pytest.raises(DataError):
        wilson_interval(3, 2)
    with pytest.raises(DataError, match="same rows"):
        bootstrap_difference(np.ones(3), np.ones(4))
    with pytest.raises(DataError, match="same rows"):
        mcnemar_test(np.ones(3, bool), np.ones(4, bool))
