"""The benchmark of advice from end to end, on made digits with a truth that was kept: it trains no network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from command_lines import convoy_json, settings_arguments

pytestmark = [pytest.mark.integration, pytest.mark.slow]

# What a run of all strategies might have measured.
TRUTH = {"linear_probe": 0.80, "early_layer_probe": 0.86, "fine_tune": 0.90, "from_scratch": 0.88}
CONFIG = {
    "candidates": [
        {
            "backbone": {"arch": "lenet5", "weights": "random", "preset": {"resize_px": 32, "crop_px": 32}},
            "taps": ["c1", "c3", "f6"],
        }
    ],
    "look": {"images_per_class": 40, "judged_per_class": 20},
    "network": {"epochs": 2},
    "extraction": {"precision": "fp32", "dtype": "float32"},
}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, page: Path) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bench")
    (folder / "advise.yaml").write_text(yaml.safe_dump(CONFIG))
    cells = [
        {
            "config": f"kept_{strategy}",
            "strategy": strategy,
            "arch": "lenet5",
            "weights": "random",
            "per_class": 20,
            "num_train_rows": 200,
            "top1_by_seed": [top1 - 0.01, top1 + 0.01],
            "top1": {"estimate": top1, "low": top1 - 0.02, "high": top1 + 0.02, "confidence": 0.95},
            "seconds": [100.0, 100.0],
        }
        for strategy, top1 in TRUTH.items()
    ]
    (folder / "truth.json").write_text(
        json.dumps({"cells": cells, "settings": {"dataset": "digits", "seeds": [0]}})
    )
    settings = [
        f"workspace={json.dumps(str(folder / 'workspace'))}",
        "datasets=[digits]",
        "per_class=[20]",
        "seeds=[0]",
        f"config={json.dumps(str(folder / 'advise.yaml'))}",
        f"configs={json.dumps([f'kept_{strategy}' for strategy in TRUTH])}",
        f"truth=[{json.dumps(str(folder / 'truth.json'))}]",
        "forecast_sizes=[10]",
        "forecast_factors=[2, 4]",
        f"results={json.dumps(str(page))}",
    ]
    return convoy_json("bench", "advise", *settings_arguments(*settings))


def test_the_ratios_come_first_and_follow_from_the_cases(report: dict[str, Any]) -> None:
    assert list(report)[:3] == ["share_within_1_point", "mean_regret", "relative_cost"]
    (case,) = report["cases"]
    assert case["best"] == "fine_tune"
    assert case["regret"] == pytest.approx(0.90 - TRUTH[case["advised"]])
    assert report["mean_regret"] == pytest.approx(case["regret"])
    assert report["share_within_1_point"] == float(case["regret"] <= 0.01)
    assert report["relative_cost"] == pytest.approx(case["advice_s"] / 800.0)


def test_what_was_kept_is_not_measured_again(report: dict[str, Any]) -> None:
    (case,) = report["cases"]
    assert case["truth"] == pytest.approx(TRUTH)
    assert case["truth_s"] == 800.0


def test_forecasts_are_compared_with_more_images(report: dict[str, Any]) -> None:
    assert set(report["forecast"]) == {"2", "4"}
    for one in report["forecasts"]:
        assert one["is_held"] == (one["forecast"]["low"] <= one["truth"] <= one["forecast"]["high"])
        assert 0.2 < one["truth"] <= 1.0


def test_the_page_has_every_case(report: dict[str, Any], page: Path) -> None:
    text = page.read_text()
    assert "share_within_1_point" in text
    assert "| digits | 20 |" in text
