"""The benchmark of advice from end to end, on made digits: every strategy of an advice is trained by its config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from command_lines import convoy_json, settings_arguments

pytestmark = [pytest.mark.integration, pytest.mark.slow]

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
    settings = [
        f"workspace={json.dumps(str(folder / 'workspace'))}",
        "datasets=[digits]",
        "per_class=[20]",
        "seeds=[0]",
        f"config={json.dumps(str(folder / 'advise.yaml'))}",
        "forecast_sizes=[8]",
        "forecast_factors=[2, 4]",
        f"results={json.dumps(str(page))}",
    ]
    return convoy_json("bench", "advise", *settings_arguments(*settings))


def test_the_ratios_come_first_and_follow_from_the_cases(report: dict[str, Any]) -> None:
    assert list(report)[:3] == ["share_within_1_point", "mean_regret", "relative_cost"]
    (case,) = report["cases"]
    assert case["regret"] == pytest.approx(max(case["truth"].values()) - case["truth"][case["advised"]])
    assert report["mean_regret"] == pytest.approx(case["regret"])
    assert report["share_within_1_point"] == float(case["regret"] <= 0.01)
    assert report["relative_cost"] == pytest.approx(case["advice_s"] / case["truth_s"])
    assert report["elsewhere"]["mean_regret"] == report["mean_regret"]


def test_every_strategy_of_the_advice_was_trained(report: dict[str, Any]) -> None:
    (case,) = report["cases"]
    assert set(case["truth"]) == set(case["expected"]) >= {"linear_probe", "fine_tune", "from_scratch"}
    assert all(0.1 < top1 <= 1 for top1 in case["truth"].values())


def test_forecasts_are_compared_with_more_images(report: dict[str, Any]) -> None:
    assert set(report["forecast"]) == {"2", "4"}
    for one in report["forecasts"]:
        assert one["is_held"] == (one["forecast"]["low"] <= one["truth"] <= one["forecast"]["high"])
        assert 0.2 < one["truth"] <= 1.0


def test_the_page_has_every_case(report: dict[str, Any], page: Path) -> None:
    text = page.read_text()
    assert "share_within_1_point" in text
    assert "| digits | 20 |" in text
