"""The benchmark of `convoy cache` from end to end, at tiny sizes: it says nothing about speed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.slow]

_SCRIPT = Path(__file__).parents[1] / "benchmarks" / "cache.py"
_NUM_IMAGES = 24
_TINY = (
    "images=[made]",
    f"num_images={_NUM_IMAGES}",
    f"num_compared={_NUM_IMAGES}",
    "repeats=1",
    "batch_size=8",
    "workers=[0, 1]",
    "probe_s=0.1",
)
_HEADLINES = (
    "ratio_to_bound",
    "ratio_to_combined_bound",
    "ratio_to_remaining_bound",
    "ratio_to_ray_docs",
    "ratio_to_dataloader",
    "ratio_to_dataloader_tuned",
    "first_row_s",
)
_WAYS = (
    "ours",
    "ours_fp32",
    "ray_docs",
    "dataloader_workers_0",
    "dataloader_workers_1",
    "dataloader_tuned_workers_0",
    "dataloader_tuned_workers_1",
)


@pytest.fixture(scope="module")
def report(page: Path) -> dict[str, Any]:
    finished = _run(*_TINY, f"results={json.dumps(str(page))}")
    assert finished.returncode == 0, finished.stderr
    printed: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return printed


def test_all_headline_numbers_are_there_and_positive(report: dict[str, Any]) -> None:
    assert all(report[name] > 0 for name in _HEADLINES)


def test_every_way_has_positive_rates_and_times_for_each_repeat(report: dict[str, Any]) -> None:
    ways = report["sets"]["made"]["ways"]
    assert set(ways) == set(_WAYS)
    for way in ways.values():
        for measure in ("images_per_s", "first_row_s", "wall_s"):
            assert len(way[measure]["all"]) == 1
            assert 0 < way[measure]["min"] <= way[measure]["median"] <= way[measure]["max"]


def test_every_bound_is_positive_and_the_network_alone_is_faster_than_all_stages_together(
    report: dict[str, Any],
) -> None:
    measured = report["sets"]["made"]
    assert set(measured["bounds"]) == {"get", "decode", "prepare", "write", "forward_bf16", "forward_fp32"}
    assert all(bound["median"] > 0 for bound in measured["bounds"].values())
    assert measured["ratios"]["ratio_to_combined_bound"]["min"] > measured["ratios"]["ratio_to_bound"]["min"]


def test_our_float32_features_equal_those_of_both_peers(report: dict[str, Any]) -> None:
    equality = report["sets"]["made"]["equality"]
    assert set(equality) == {"ray_docs", "dataloader"}
    for compared in equality.values():
        assert compared["num_images"] == _NUM_IMAGES
        assert compared["min_cosine"] > 0.9999
        assert compared["min_centred_cosine"] > 0.99


def test_the_machine_and_the_settings_are_on_record(report: dict[str, Any]) -> None:
    assert {"cores", "cpu", "cpu_flags", "torch", "torchvision", "ray", "pyarrow"} <= set(report["machine"])
    assert report["settings"]["num_images"] == _NUM_IMAGES
    assert report["sets"]["made"]["images"]["mean_bytes"] > 10_000


def test_the_page_for_people_names_every_way(report: dict[str, Any], page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert all(f"| {way} |" in text for way in (*_WAYS, *report["sets"]["made"]["ratios"]))


def test_without_any_images_the_benchmark_ends_with_the_reason(tmp_path: Path) -> None:
    finished = _run("images=[imagenet]", f"data={json.dumps(str(tmp_path))}")
    assert finished.returncode == 1
    assert "there is no imagenet-250.tar" in finished.stderr


def test_an_unknown_key_is_a_usage_error_that_names_the_nearest() -> None:
    finished = _run("num_image=3")
    assert finished.returncode == 2
    assert "num_images" in finished.stderr


def _run(*settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(_SCRIPT), *settings], capture_output=True, text=True, check=False
    )
