"""The benchmark of `convoy evaluate` from end to end, at tiny sizes: it says nothing about speed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# A loaded machine may take several times as long.
pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1500)]

_BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
_NUM_IMAGES = 4
_TINY = (
    # One more than the largest committee has.
    'archs=["torchvision:resnet18", "torchvision:resnet18", "torchvision:resnet34"]',
    "sizes=[1, 2]",
    "crop_px=32",
    "batch_size=2",
    f"num_images={_NUM_IMAGES}",
    f"num_compared={_NUM_IMAGES}",
    "workers=[0]",
    "probe_s=0.1",
    "num_gated=40",
)
_WAYS = {"ours", "tta_loop_workers_0", "tencrop_workers_0"}


@pytest.fixture(scope="module")
def report(page: Path) -> dict[str, Any]:
    finished = _run(*_TINY, f"results={json.dumps(str(page))}")
    assert finished.returncode == 0, finished.stderr
    printed: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return printed


def test_the_ratios_are_those_of_the_largest_committee(report: dict[str, Any]) -> None:
    for name in ("ratio_to_bound", "ratio_to_remaining_bound", "ratio_to_tta_loop", "ratio_to_tencrop"):
        assert report[name] == report["committees"]["2"]["ratios"][name]["median"] > 0


def test_every_way_and_bound_has_a_rate_for_each_committee(report: dict[str, Any]) -> None:
    assert set(report["committees"]) == {"1", "2"}
    for measured in report["committees"].values():
        assert set(measured["images_per_s"]) == _WAYS
        assert set(measured["bounds"]) == {"forward", "combined", "prepare"}
        for rates in (*measured["images_per_s"].values(), *measured["bounds"].values()):
            assert len(rates["all"]) == 1
            assert rates["min"] > 0


def test_networks_and_others_share_the_machine(report: dict[str, Any]) -> None:
    for measured in report["committees"].values():
        (networks,), (others,) = measured["network_share"], measured["others_share"]
        assert 0 < networks < 1
        assert others is None or 0 < others < 1


def test_joint_outputs_equal_those_of_the_usual_ways(report: dict[str, Any]) -> None:
    assert set(report["equality"]) == {"tta_loop", "tencrop"}
    for equality in report["equality"].values():
        assert equality["num_images"] == _NUM_IMAGES
        assert equality["min_cosine"] > 0.9999


def test_the_gate_is_measured_where_real_images_are_at_hand(report: dict[str, Any]) -> None:
    if isinstance(report["gated"], str):
        assert "skipped" in report["gated"]
        assert report["gated_agreement"] is report["gated_speedup"] is None
        return
    assert report["gated"]["num_images"] == 20
    assert 0.5 < report["gated_agreement"] <= 1
    assert report["gated_speedup"] > 0.5


def test_the_machine_and_the_settings_are_on_record(report: dict[str, Any]) -> None:
    assert {"cores", "cpu", "torch", "torchvision"} <= set(report["machine"])
    assert report["settings"]["num_images"] == _NUM_IMAGES


def test_the_page_for_people_names_every_way_and_ratio(report: dict[str, Any], page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    names = {*_WAYS, *report["committees"]["2"]["ratios"], "networks had", "## Gated"}
    assert all(name in text for name in names)


def test_an_unknown_key_is_a_usage_error_that_names_the_nearest() -> None:
    finished = _run("num_image=3")
    assert finished.returncode == 2
    assert "num_images" in finished.stderr


def _run(*settings: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(_BENCHMARKS / "evaluate.py"), *settings]
    return subprocess.run(command, capture_output=True, text=True, check=False)
