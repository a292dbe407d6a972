from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from convoy.core.errors import DataError
from convoy.core.machine import machine_facts
from convoy.pipelines.backbone_costs import BackboneCost
from convoy.pipelines.cost_front import CostAxis, CostFront, cost_fronts
from convoy.vision.engine_options import Precision

NUM_ROWS = 400


def cost(images_per_s: float, **changes: Any) -> BackboneCost:
    values: dict[str, Any] = {
        "arch": "made",
        "weights_digest": "0" * 32,
        "input_px": 32,
        "num_parameters": 1000,
        "size_bytes": 4000,
        "macs": 10**6,
        "images_per_s": images_per_s,
        "from_store": True,
        "network_images_per_s": 2 * images_per_s,
        "slow_network_images_per_s": 1.6 * images_per_s,
        "fast_network_images_per_s": 2.4 * images_per_s,
        "latency_p50_ms": 5000 / images_per_s,
        "latency_p95_ms": 9000 / images_per_s,
        "peak_memory_bytes": 2**20 * 100,
        "usd_per_million": None,
        "precision": Precision.FP32,
        "batch_size": 32,
        "compiled": False,
        "num_threads": 2,
        "machine": machine_facts(None),
        "measured_unix_s": 1.0,
    }
    return BackboneCost(**(values | changes))


def correct(*rates: float) -> np.ndarray:
    """Rows that are right for each rate; the better backbone is right wherever the worse one is."""
    return np.stack([np.arange(NUM_ROWS) < round(rate * NUM_ROWS) for rate in rates])


def front_of(fronts: list[CostFront], axis: CostAxis) -> CostFront:
    return next(front for front in fronts if front.axis is axis)


def test_a_dominated_backbone_names_who_beats_it_and_by_how_much() -> None:
    costs = [cost(1000), cost(200), cost(100)]
    fronts = cost_fronts(costs, ["small", "good", "bad"], correct(0.7, 0.9, 0.8))
    choices = {choice.backbone: choice for choice in front_of(fronts, CostAxis.THROUGHPUT).choices}
    assert [name for name, choice in choices.items() if choice.is_best] == ["small", "good"]
    dominance = choices["bad"].dominated_by
    assert dominance is not None
    assert (dominance.backbone, dominance.cost_ratio) == ("good", 2.0)
    assert dominance.top1_difference.estimate == pytest.approx(0.1)
    assert 0.05 < dominance.top1_difference.low < 0.1 < dominance.top1_difference.high < 0.15
    assert (
        "good is 10.00 points more accurate, and this one costs 2.00 times as much"
        in choices["bad"].explanation
    )


def test_choices_come_from_the_cheapest_on_with_intervals_and_gains() -> None:
    costs = [cost(100), cost(1000), cost(500)]
    front = front_of(
        cost_fronts(costs, ["dear", "cheap", "middle"], correct(0.9, 0.7, 0.8)), CostAxis.LATENCY
    )
    assert [choice.backbone for choice in front.choices] == ["cheap", "middle", "dear"]
    assert [choice.cost for choice in front.choices] == [5.0, 10.0, 50.0]
    assert front.num_rows == NUM_ROWS
    for choice, rate in zip(front.choices, (0.7, 0.8, 0.9), strict=True):
        assert choice.top1.low < choice.top1.estimate == rate < choice.top1.high
    gains = [choice.gain for choice in front.choices]
    assert gains[0] is None
    assert [gain.estimate for gain in gains[1:] if gain] == [pytest.approx(0.1), pytest.approx(0.1)]


def test_rows_count_by_their_weight() -> None:
    """The dearer backbone is better on the half of the rows that stands for a tenth."""
    correct_MN = np.stack([np.arange(NUM_ROWS) < NUM_ROWS // 2, np.arange(NUM_ROWS) >= 0])
    costs, weights_N = [cost(1000), cost(100)], np.repeat([1.8, 0.2], NUM_ROWS // 2)
    cheap, dear = cost_fronts(costs, ["cheap", "dear"], correct_MN, weights_N)[0].choices
    assert (cheap.top1.estimate, dear.top1.estimate) == pytest.approx((0.9, 1.0))
    assert dear.gain is not None
    assert dear.gain.low < dear.gain.estimate == pytest.approx(0.1)


def test_a_gain_that_may_be_chance_is_called_so() -> None:
    correct_MN = correct(0.8, 0.8)
    # 21 rows won and 19 lost.
    correct_MN[1, :19], correct_MN[1, -21:] = False, True
    front = cost_fronts([cost(1000), cost(100)], ["cheap", "dear"], correct_MN)[0]
    assert front.choices[1].is_best
    assert "may be chance" in front.choices[1].explanation


def test_a_dominated_backbone_may_be_as_accurate() -> None:
    front = cost_fronts([cost(1000), cost(500)], ["cheap", "dear"], correct(0.8, 0.8))[0]
    assert front.choices[1].explanation == "cheap is as accurate, and this one costs 2.00 times as much"


@pytest.mark.parametrize(
    ("axis", "dear", "said"),
    [
        # Batches at 1.25 and 1.2 times the median time were measured of both.
        (CostAxis.THROUGHPUT, {"images_per_s": 82}, "and this one is about as dear"),
        (CostAxis.THROUGHPUT, {"images_per_s": 78}, "and this one costs 1.28 times as much"),
        (CostAxis.MONEY, {"usd_per_million": 1.2}, "and this one is about as dear"),
        (CostAxis.MONEY, {"usd_per_million": 1.3}, "and this one costs 1.30 times as much"),
        (CostAxis.LATENCY, {"latency_p50_ms": 51.0}, "and this one is about as dear"),
        (CostAxis.LATENCY, {"latency_p50_ms": 54.0}, "and this one costs 1.08 times as much"),
        (CostAxis.MEMORY, {"peak_memory_bytes": 2**20 * 104}, "and this one is about as dear"),
        (CostAxis.MEMORY, {"peak_memory_bytes": 2**20 * 110}, "and this one costs 1.10 times as much"),
    ],
)
def test_costs_that_differ_by_less_than_was_measured_are_about_the_same(
    axis: CostAxis, dear: dict[str, Any], said: str
) -> None:
    cheap = cost(100, usd_per_million=1.0)
    costs = [cheap, cheap.model_copy(update=dear)]
    front = front_of(cost_fronts(costs, ["cheap", "dear"], correct(0.9, 0.8)), axis)
    (choice,) = [one for one in front.choices if not one.is_best]
    assert choice.backbone == "dear"
    assert choice.explanation.endswith(said)


@pytest.mark.parametrize(
    ("from_store", "way"), [(True, "from the store to features"), (False, "in the network alone")]
)
def test_a_cost_says_what_it_is_of(from_store: bool, way: str) -> None:
    costs = [cost(1000, from_store=from_store, usd_per_million=1.0)] * 2
    fronts = cost_fronts(costs, ["a", "b"], correct(0.7, 0.8))
    assert front_of(fronts, CostAxis.THROUGHPUT).unit == f"milliseconds an image {way}, all workers together"
    assert front_of(fronts, CostAxis.MONEY).unit == f"price of a million images {way}"


def test_axes_without_a_cost_for_everyone_are_left_out() -> None:
    costs = [cost(1000, usd_per_million=3.0), cost(100, usd_per_million=30.0, peak_memory_bytes=None)]
    fronts = cost_fronts(costs, ["a", "b"], correct(0.7, 0.8))
    assert [front.axis for front in fronts] == [CostAxis.THROUGHPUT, CostAxis.LATENCY, CostAxis.MONEY]
    assert [choice.cost for choice in fronts[2].choices] == [3.0, 30.0]


def test_axes_may_disagree() -> None:
    costs = [cost(1000, peak_memory_bytes=2**30), cost(500, peak_memory_bytes=2**20)]
    fronts = cost_fronts(costs, ["fast", "small"], correct(0.8, 0.7))
    throughput, memory = front_of(fronts, CostAxis.THROUGHPUT), front_of(fronts, CostAxis.MEMORY)
    assert [choice.is_best for choice in throughput.choices] == [True, False]
    assert [choice.is_best for choice in memory.choices] == [True, True]


@pytest.mark.parametrize(
    ("names", "correct_MN"), [(["a"], correct(0.5, 0.6)), (["a", "b"], np.zeros((2, 0), bool))]
)
def test_what_does_not_fit_together_is_refused(names: list[str], correct_MN: np.ndarray) -> None:
    with pytest.raises(DataError, match="a cost, a name and the same rows"):
        cost_fronts([cost(10), cost(20)], names, correct_MN)


@pytest.mark.parametrize(("more_right", "may_be_chance"), [(4, True), (8, False)])
def test_a_few_rows_that_only_one_gets_right_show_little_though_all_of_them_agree(
    more_right: int, may_be_chance: bool
) -> None:
    """McNemar's mid-p of 4 to 0 is 0.06; a percentile bootstrap of their difference would end above zero."""
    rows_MN = np.stack([np.arange(50) < 30, np.arange(50) < 30 + more_right])
    front = front_of(cost_fronts([cost(1000), cost(100)], ["cheap", "dear"], rows_MN), CostAxis.THROUGHPUT)
    (dear,) = [choice for choice in front.choices if choice.backbone == "dear"]
    assert dear.gain is not None
    assert dear.gain.estimate == pytest.approx(more_right / 50)
    assert ("may be chance" in dear.explanation) is may_be_chance
