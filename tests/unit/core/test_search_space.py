"""Search spaces: what a config may say, and which points are drawn in which order."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convoy.core.errors import ConfigError
from convoy.core.fingerprints import canonical_json
from convoy.core.search_space import SearchSpace, parse_space, with_values

MIXED: dict[str, Any] = {
    "strategy": {"grid": ["fine_tune", "from_scratch"]},
    "learning_rate": {"log_uniform": [1e-3, 1.0]},
    "recipe": {"seed": {"int": [0, 3]}, "label_smoothing": {"uniform": [0.0, 0.2]}},
    "head.kind": {"choice": ["softmax", "mlp"]},
}


def first(space: SearchSpace, number: int, *, seed: int = 0) -> list[dict[str, Any]]:
    return list(itertools.islice(space.points(seed), number))


def test_nested_sections_and_dotted_keys_mean_the_same() -> None:
    nested = parse_space({"recipe": {"seed": {"int": [0, 3]}}})
    assert nested == parse_space({"recipe.seed": {"int": [0, 3]}})
    assert set(parse_space(MIXED).domains) == {
        "strategy",
        "learning_rate",
        "recipe.seed",
        "recipe.label_smoothing",
        "head.kind",
    }


@given(seed=st.integers(0, 2**32))
def test_points_depend_on_the_seed_only_and_stay_inside(seed: int) -> None:
    space = parse_space(MIXED)
    points = first(space, 12, seed=seed)
    assert points == first(space, 12, seed=seed)
    assert points[:5] == first(space, 5, seed=seed)
    for point in points:
        assert 1e-3 <= point["learning_rate"] <= 1.0
        assert point["recipe.seed"] in range(4)
        assert 0.0 <= point["recipe.label_smoothing"] <= 0.2
        assert point["head.kind"] in ("softmax", "mlp")
    # Two cells of the grid, one after the other.
    assert [point["strategy"] for point in points] == ["fine_tune", "from_scratch"] * 6


def test_rates_are_spread_over_orders_of_magnitude() -> None:
    rates = [point["lr"] for point in first(parse_space({"lr": {"log_uniform": [1e-4, 1.0]}}), 400)]
    assert 0.4 < sum(rate < 1e-2 for rate in rates) / 400 < 0.6
    assert first(parse_space({"lr": {"uniform": [0.0, 1.0]}}), 3, seed=1) != first(
        parse_space({"lr": {"uniform": [0.0, 1.0]}}), 3, seed=2
    )


def test_a_grid_gives_every_cell_once() -> None:
    space = parse_space({"a": {"grid": [1, 2, 3]}, "b": {"grid": ["x", "y"]}})
    assert space.is_grid
    points = [(point["a"], point["b"]) for point in space.points(0)]
    assert sorted(points) == sorted(itertools.product([1, 2, 3], "xy"))


def test_a_finite_space_ends_when_every_point_was_drawn() -> None:
    space = parse_space({"a": {"choice": [1, 2, 3]}, "b": {"int": [0, 1]}})
    points = [(point["a"], point["b"]) for point in space.points(0)]
    assert sorted(points) == sorted(itertools.product([1, 2, 3], [0, 1]))
    assert not space.is_grid


def test_a_large_finite_space_gives_every_point_though_few_are_left_to_draw() -> None:
    space = parse_space({"seed": {"int": [0, 999]}, "depth": {"choice": [1, 2]}})
    points = [(point["seed"], point["depth"]) for point in space.points(0)]
    assert sorted(points) == sorted(itertools.product(range(1000), [1, 2]))


@pytest.mark.parametrize(
    ("space", "number"),
    [
        ({"recipe.seed": {"grid": list(range(40))}, "learning_rate": {"grid": [0.1, 0.2]}}, 80),
        ({"recipe.seed": {"grid": [0, 1, 2]}, "head.kind": {"choice": ["softmax", "mlp"]}}, 6),
        ({"recipe.seed": {"int": [0, 3]}, "config": {"choice": [{"epochs": 1}, {"epochs": 2}]}}, 8),
    ],
)
def test_nothing_is_drawn_after_the_last_point_of_a_finite_space(
    space: dict[str, Any], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    draw = SearchSpace._point

    def counted(space: SearchSpace, seed: int, number: int) -> dict[str, Any]:
        drawn.append(number)
        return draw(space, seed, number)

    monkeypatch.setattr(SearchSpace, "_point", counted)
    points = parse_space(space).points(0)
    assert len(list(itertools.islice(points, number))) == number
    drawn.clear()
    assert next(points, None) is None
    assert drawn == []


def test_spot_checks_hold_every_value_and_every_end() -> None:
    space = parse_space(MIXED)
    for limit, number in ((100, 2 * 2 * 2 * 2 * 2), (10, 10)):
        checked = list(space.spot_checks(limit))
        assert len(checked) == number
        assert {point["learning_rate"] for point in checked} == {1e-3, 1.0}
        assert {point["strategy"] for point in checked} == {"fine_tune", "from_scratch"}
        assert {point["recipe.seed"] for point in checked} == {0, 3}


def test_values_are_put_in_at_their_keys() -> None:
    base = {"recipe": {"batch_size": 32}, "strategy": "linear_probe", "reuse": None}
    values = {
        "config": {"strategy": "partial_reuse", "reuse": {"after": "layer1"}, "recipe.mixup_alpha": 0.2},
        "recipe.seed": 3,
        "reuse.dropout": 0.5,
        "backbone.preset.crop_px": 64,
    }
    assert with_values(base, values) == {
        "recipe": {"batch_size": 32, "mixup_alpha": 0.2, "seed": 3},
        "strategy": "partial_reuse",
        "reuse": {"after": "layer1", "dropout": 0.5},
        "backbone": {"preset": {"crop_px": 64}},
    }
    assert base == {"recipe": {"batch_size": 32}, "strategy": "linear_probe", "reuse": None}
    assert values["config"]["reuse"] == {"after": "layer1"}
    assert with_values(base, {"config": {"recipe": {"seed": 3}}})["recipe"] == {"seed": 3}
    with pytest.raises(ConfigError, match="'augmentation' is 'cifar', not a section"):
        with_values({"augmentation": "cifar"}, {"augmentation.rotation.degrees": 5})


def test_values_in_a_section_stay_in_whichever_order_they_were_listed() -> None:
    values = {
        "backbone.preset": {"crop_px": 128},
        "backbone": {"arch": "resnet18"},
        "config": {"recipe.seed": 3, "recipe": {"batch_size": 64}},
    }
    expected = {
        "backbone": {"arch": "resnet18", "preset": {"crop_px": 128}},
        "recipe": {"batch_size": 64, "seed": 3},
    }
    backwards = {**dict(reversed(values.items())), "config": dict(reversed(values["config"].items()))}
    for listed in (values, backwards, json.loads(canonical_json(values))):
        assert with_values({}, listed) == expected


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({}, "the search space is empty"),
        ({"lr": 0.1}, "'lr' of the search space is 0.1, which is no domain"),
        ({"lr": {}}, "no domain"),
        ({"lr": {"loguniform": [1, 2]}}, "did you mean 'log_uniform'"),
        ({"lr": {"choice": []}}, "needs a list of values"),
        ({"lr": {"choice": "abc"}}, "needs a list of values"),
        ({"lr": {"grid": [1, 1]}}, "lists a value twice"),
        ({"lr": {"uniform": [1]}}, "needs two numbers"),
        ({"lr": {"uniform": ["low", "high"]}}, "needs two numbers"),
        ({"lr": {"log_uniform": [0, 1]}}, "positive, finite and ascending"),
        ({"recipe": {"seed": {"int": [3, 3]}}}, "'recipe.seed' of the search space needs ends"),
        ({"config": {"choice": ["fine_tune"]}}, "stands for the whole config"),
    ],
)
def test_what_is_no_space_is_refused_with_the_key(space: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_space(space)
