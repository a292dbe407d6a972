"""`convoy advise` on real digits: measured, ranked, ready to run, verified, and never computed twice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from command_lines import convoy_here, last_json, settings_arguments
from convoy.core.config import load_config
from convoy.pipelines.train_config import TrainConfig
from train_jobs import LENET, frozen_digits

pytestmark = pytest.mark.integration

SETTINGS = (
    "dataset=digits",
    f"candidates=[{{backbone: {LENET}, taps: [c1, c3, f6]}}]",
    "look={least_judged: 30, judged_per_class: 100}",
    "curve={repeats: 2}",
    "network={epochs: 2, recipe: {batch_size: 16}}",
    "verify={images_per_class: 6, epochs: 1, strategies: 2}",
    "wanted_top1=0.999",
    "extraction={precision: fp32, dtype: float32, batch_size: 64}",
)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, ray_cluster: dict[str, str]) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ray_cluster.items():
            patch.setenv(name, value)
        yield frozen_digits(tmp_path_factory.mktemp("advise"))


@pytest.fixture(scope="module")
def report(workspace: str) -> dict[str, Any]:
    return advise(workspace)


def advise(workspace: str, *settings: str) -> dict[str, Any]:
    arguments = settings_arguments(*SETTINGS, *settings)
    finished = convoy_here("advise", "--workspace", workspace, *arguments, "--json")
    assert finished.returncode == 0, finished.stderr
    return last_json(finished)


def test_strategies_come_ranked_with_what_they_are_expected_to_be_worth_and_cost(
    report: dict[str, Any],
) -> None:
    strategies = report["strategies"]
    assert [one["rank"] for one in strategies] == [1, 2, 3, 4]
    assert {one["strategy"] for one in strategies} == {
        "linear_probe",
        "early_layer_probe",
        "fine_tune",
        "from_scratch",
    }
    for one in strategies:
        assert one["interval"]["low"] <= one["expected_top1"] <= one["interval"]["high"]
        assert one["cost"]["seconds"] > 0
    probe = next(one for one in strategies if one["strategy"] == "linear_probe")
    assert probe["basis"] == "measured"
    # 33 digits judge features of random weights: far above chance, and no miracle.
    assert 0.3 < probe["expected_top1"] < 0.98


def test_every_depth_was_probed_in_one_pass(workspace: str, report: dict[str, Any]) -> None:
    (probes,) = report["similarity"]["probes"]
    assert [tap["tap"] for tap in probes["taps"]] == ["c1", "c3", "f6"]
    assert probes["judged_rows"] == 33
    assert all(tap["num_correct"] == round(33 * tap["top1"]["estimate"]) for tap in probes["taps"])
    # Random weights are no better than random weights.
    assert report["similarity"]["dissimilarity"] == pytest.approx(1.0)
    passes = [path for path in Path(workspace, "runs").glob("*/run.json") if '"cache"' in path.read_text()]
    assert len(passes) >= 1


def test_the_data_is_described_with_its_size_and_its_images(report: dict[str, Any]) -> None:
    size = report["size"]
    assert size["samples"] == {"train": 96, "val": 33, "test": 60}
    assert size["classes"] == 10
    assert size["looked_at"] == 189
    assert size["rejects"] == 0
    assert size["resolution"]["median_width_px"] == 32
    assert size["images_per_class_min"] <= size["images_per_class_median"] <= size["images_per_class_max"]
    assert report["rule"]["size"] == "small"


def test_more_data_is_forecast_by_a_curve(report: dict[str, Any]) -> None:
    more = report["more_data"]
    assert [point["factor"] for point in more["advised"]] == [1.0, 2.0, 4.0]
    assert len(more["curve"]["points"]) >= 3
    expected = more["advised"][0]["top1"]["estimate"]
    gain = more["advised"][1]["top1"]["estimate"] - expected
    helps = more["images_needed"] is not None or gain >= report["prior"]["collect_from"]
    assert more["advice"] == ("enough" if expected >= 0.999 else "collect" if helps else "no_help")
    assert f"{expected:.3f}" in more["why"]


def test_the_configs_are_ready_to_run(workspace: str, report: dict[str, Any]) -> None:
    for one in report["strategies"]:
        config = load_config(TrainConfig, one["config"])
        assert config.strategy == one["strategy"]
        assert config.workspace == workspace
    path = next(one["config"] for one in report["strategies"] if one["strategy"] == "linear_probe")
    finished = convoy_here("train", "--config", path, "--json")
    assert finished.returncode == 0, finished.stderr
    trained = last_json(finished)
    assert trained["bundle"].startswith(yaml.safe_load(Path(path).read_text())["name"])
    assert trained["top1"] > 0.3


def test_the_advice_was_verified_on_rows_that_are_not_held_out(
    workspace: str, report: dict[str, Any]
) -> None:
    verification = report["verification"]
    runs = verification["runs"]
    assert [run["rank"] for run in runs] == [1, 2]
    best = max(run["top1"]["estimate"] for run in runs)
    assert all(run["top1"]["low"] < run["top1"]["high"] for run in runs)
    assert verification["regret"] == pytest.approx(best - runs[0]["top1"]["estimate"])
    difference = runs[1]["top1"]["estimate"] - runs[0]["top1"]["estimate"]
    assert verification["difference"]["estimate"] == pytest.approx(difference)
    assert verification["left_out"] == 2
    assert len(list(Path(workspace, "runs", report["run"], "verified").rglob("*.json"))) == 2


def test_the_same_advice_again_is_read_and_computes_nothing(workspace: str, report: dict[str, Any]) -> None:
    before = sorted(path.name for path in Path(workspace, "runs").iterdir())
    assert advise(workspace) == report
    assert sorted(path.name for path in Path(workspace, "runs").iterdir()) == before


def test_another_question_on_the_same_data_uses_the_same_features(
    workspace: str, report: dict[str, Any]
) -> None:
    before = {path.name for path in Path(workspace, "runs").iterdir()}
    other = advise(workspace, "wanted_top1=null", "verify=null")
    added = {path.name for path in Path(workspace, "runs").iterdir()} - before
    assert added == {other["run"]}
    assert other["verification"] is None
    assert (
        other["similarity"]["probes"][0]["taps"][2]["num_correct"]
        == (report["similarity"]["probes"][0]["taps"][2]["num_correct"])
    )
