"""The rule of advice, on numbers like those of photos of hands and of CIFAR images under a CIFAR network."""

from __future__ import annotations

from typing import Any

import pytest

from convoy.core.learning_curve import Shrink
from convoy.core.statistics import Interval
from convoy.pipelines.advise_rule import (
    DataSize,
    Evidence,
    JudgedProbe,
    Likeness,
    TransferPrior,
    dissimilarity,
    expected_network,
    expected_probe,
    four_scenarios,
    progress,
    rank,
)
from convoy.pipelines.classifiers import Strategy

PRIOR = TransferPrior()


def probe(top1: float, *, tap: str = "pooled", num_rows: int = 1000) -> JudgedProbe:
    return JudgedProbe(tap=tap, num_correct=round(top1 * num_rows), num_rows=num_rows)


def evidence(images: float, *, top: float, best: float, untrained: float, **fields: Any) -> Evidence:
    return Evidence(
        images_per_class=images,
        chance_top1=0.1,
        top=probe(top),
        best=probe(best, tap="layer3.0"),
        untrained=probe(untrained),
        **fields,
    )


# The labels are few shapes on plain ground: features of planes and frogs serve no better than half of the way.
HANDS = evidence(50, top=0.78, best=0.83, untrained=0.62)
# The very classes of the pretraining, as other images.
PLANES = evidence(20, top=0.82, best=0.82, untrained=0.24)


def network(strategy: Strategy, known: Evidence) -> float:
    start = known.untrained if strategy is Strategy.FROM_SCRATCH else known.best
    return expected_network(strategy, known, PRIOR, start=start).estimate


def test_progress_counts_factors_of_the_error_below_chance() -> None:
    assert progress(0.9, 0.1) == 0.0
    assert progress(0.95, 0.1) == 0.0
    assert progress(0.09, 0.1) == pytest.approx(2.302585, abs=1e-5)


def test_images_that_pretraining_knows_are_similar_and_others_are_not() -> None:
    assert dissimilarity(PLANES) < 0.2
    assert 0.4 < dissimilarity(HANDS) < 0.7


def test_what_gets_lost_on_the_way_to_the_top_is_dissimilar_too() -> None:
    lost = evidence(100, top=0.3, best=0.8, untrained=0.12)
    assert dissimilarity(lost) > 0.7


def test_where_no_probe_beats_chance_nothing_of_the_pretraining_serves() -> None:
    assert dissimilarity(evidence(100, top=0.1, best=0.1, untrained=0.1)) == 1.0


def test_unlike_images_are_worth_training_on_and_alike_few_ones_are_not() -> None:
    assert network(Strategy.FINE_TUNE, HANDS) > expected_probe(HANDS.best).estimate + 0.05
    assert network(Strategy.FROM_SCRATCH, HANDS) > expected_probe(HANDS.best).estimate
    assert network(Strategy.FINE_TUNE, PLANES) < expected_probe(PLANES.top).estimate
    assert network(Strategy.FROM_SCRATCH, PLANES) < 0.5


def test_many_alike_images_are_worth_fine_tuning() -> None:
    many = PLANES.model_copy(update={"images_per_class": 5000.0})
    assert network(Strategy.FINE_TUNE, many) > expected_probe(many.top).estimate + 0.02


@pytest.mark.parametrize("strategy", [Strategy.FINE_TUNE, Strategy.FROM_SCRATCH, Strategy.PARTIAL_REUSE])
def test_more_images_never_lower_an_expectation(strategy: Strategy) -> None:
    found = [
        network(strategy, HANDS.model_copy(update={"images_per_class": float(images)}))
        for images in (5, 20, 100, 1000)
    ]
    assert found == sorted(found)


def test_new_layers_on_few_images_are_worth_less_than_all_from_scratch() -> None:
    few = HANDS.model_copy(update={"images_per_class": 10.0})
    reused = expected_network(Strategy.PARTIAL_REUSE, few, PRIOR, start=few.untrained)
    assert reused.estimate < network(Strategy.FROM_SCRATCH, few)


def test_intervals_carry_the_rows_and_the_prior() -> None:
    narrow = TransferPrior(spread=0.0)
    wide = expected_network(Strategy.FINE_TUNE, HANDS, PRIOR, start=HANDS.best)
    sure = expected_network(Strategy.FINE_TUNE, HANDS, narrow, start=HANDS.best)
    few_rows = expected_probe(probe(0.83, num_rows=50))
    many_rows = expected_probe(probe(0.83, num_rows=5000))
    assert wide.high - wide.low > 1.5 * (sure.high - sure.low)
    assert few_rows.high - few_rows.low > 5 * (many_rows.high - many_rows.low)
    assert many_rows.low < 0.83 < many_rows.high


def test_errors_shrink_by_what_the_learning_curve_says() -> None:
    assert expected_probe(probe(0.8), shrink=Shrink(factor=0.5)).estimate == pytest.approx(0.9, abs=0.003)
    more = HANDS.model_copy(update={"shrink": Shrink(factor=0.5)})
    assert network(Strategy.FINE_TUNE, more) > network(Strategy.FINE_TUNE, HANDS)


@pytest.mark.parametrize(
    ("images", "known", "size", "likeness", "strategy"),
    [
        (20, PLANES, DataSize.SMALL, Likeness.SIMILAR, Strategy.LINEAR_PROBE),
        (20, HANDS, DataSize.SMALL, Likeness.DIFFERENT, Strategy.EARLY_LAYER_PROBE),
        (2000, PLANES, DataSize.LARGE, Likeness.SIMILAR, Strategy.FINE_TUNE),
        (2000, HANDS, DataSize.LARGE, Likeness.DIFFERENT, Strategy.FINE_TUNE),
    ],
)
def test_the_rule_of_thumb_has_four_scenarios(
    images: float, known: Evidence, size: DataSize, likeness: Likeness, strategy: Strategy
) -> None:
    scenario = four_scenarios(known.model_copy(update={"images_per_class": images}), PRIOR)
    assert (scenario.size, scenario.likeness, scenario.strategy) == (size, likeness, strategy)
    assert f"{images:g} images a class" in scenario.says
    assert f"{scenario.dissimilarity:.2f}" in scenario.says


def expected(*lows_and_estimates: tuple[float, float]) -> list[Interval]:
    return [Interval(estimate=top1, low=low, high=1.0, confidence=0.95) for low, top1 in lows_and_estimates]


def test_of_strategies_that_are_as_good_the_cheapest_is_advised() -> None:
    spans_s = [(0.5, 2.0), (50.0, 200.0), (0.05, 0.2)]
    order, equal = rank(expected((0.7, 0.90), (0.8, 0.903), (0.7, 0.8)), spans_s, tie=0.005)
    assert order == [0, 1, 2]
    assert equal == [0, 1]
    assert rank(expected((0.7, 0.90), (0.8, 0.92), (0.7, 0.8)), spans_s, tie=0.005) == ([1, 0, 2], [1])
    # An own network that costs nothing is cheaper than all that is trained.
    free_s = [(0.0, 0.0), (0.5, 2.0)]
    assert rank(expected((0.7, 0.90), (0.8, 0.903)), free_s, tie=0.005)[0] == [0, 1]


def test_of_those_that_may_cost_the_same_the_surest_is_advised() -> None:
    """Costs are known to a factor of two: three per cent less is no reason."""
    alike_s = [(50.0, 200.0), (49.0, 196.0), (60.0, 240.0)]
    found = expected((0.80, 0.90), (0.75, 0.899), (0.78, 0.901))
    assert rank(found, alike_s, tie=0.005) == ([0, 2, 1], [0, 1, 2])
    # Of the same the cheaper one.
    assert rank(expected((0.8, 0.9), (0.8, 0.9)), alike_s[:2], tie=0.005)[0] == [1, 0]


def test_intervals_carry_how_far_the_learning_curve_is_trusted() -> None:
    sure, unsure = (Shrink(factor=0.5, spread=spread) for spread in (0.0, 0.6))
    found = [expected_probe(probe(0.8), shrink=shrink) for shrink in (sure, unsure)]
    assert found[1].high - found[1].low > 3 * (found[0].high - found[0].low)
    assert found[1].estimate == pytest.approx(found[0].estimate, abs=0.01)
    # More images do no harm.
    assert found[1].low >= expected_probe(probe(0.8)).low - 0.01
    tuned = [
        expected_network(
            Strategy.FINE_TUNE, HANDS.model_copy(update={"shrink": shrink}), PRIOR, start=HANDS.best
        )
        for shrink in (sure, unsure)
    ]
    assert tuned[1].high - tuned[1].low > tuned[0].high - tuned[0].low
