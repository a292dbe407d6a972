"""The benchmark of `convoy train` from end to end, at tiny sizes: it says nothing about speed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageOps

from cache_jobs import freeze, write_digits

# A loaded machine may take several times as long.
pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1500)]

_BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
_NUM_IMAGES = 16
_NUM_DIGITS = 200
_EPOCHS = 2
_TINY = (
    *(f"{workload}.num_images={_NUM_IMAGES}" for workload in ("compute", "data")),
    *(f"{workload}.batch_size=8" for workload in ("compute", "data")),
    *(f"{workload}.epochs={_EPOCHS}" for workload in ("compute", "data")),
    "compute.crop_px=32",
    "repeats=1",
    "workers=[1]",
)
_HEADLINES = ("ratio_to_mock_loader", "ratio_to_dataloader", "head_epoch_speedup_from_cache")
_WAYS = ("ours", "dataloader_workers_1", "dataloader_tuned_workers_1")


@pytest.fixture(scope="module")
def report(page: Path, ray_cluster: Mapping[str, str]) -> dict[str, Any]:
    finished = _run(*_TINY, f"results={json.dumps(str(page))}", environment=ray_cluster)
    assert finished.returncode == 0, finished.stderr
    printed: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return printed


def test_all_headline_numbers_are_there_and_positive(report: dict[str, Any]) -> None:
    assert all(report[name] > 0 for name in _HEADLINES)


def test_every_way_and_bound_of_both_workloads_has_a_rate_for_each_repeat(report: dict[str, Any]) -> None:
    assert set(report["workloads"]) == {"compute", "data"}
    for measured in report["workloads"].values():
        assert set(measured["images_per_s"]) == set(_WAYS)
        assert set(measured["bounds"]) == {"mock_loader", "loader", "combined"}
        for rates in (*measured["images_per_s"].values(), *measured["bounds"].values()):
            assert len(rates["all"]) == 1
            assert rates["min"] > 0


def test_a_ratio_is_our_rate_over_that_of_the_best_number_of_workers(report: dict[str, Any]) -> None:
    measured = report["workloads"]["data"]
    ours, peer = measured["images_per_s"]["ours"], measured["images_per_s"]["dataloader_workers_1"]
    assert measured["best_workers"]["dataloader"] == "dataloader_workers_1"
    assert report["ratio_to_dataloader"] == pytest.approx(ours["median"] / peer["median"])


def test_our_first_losses_equal_those_of_a_plain_loop_over_images_of_torchvision(
    report: dict[str, Any],
) -> None:
    for measured in report["workloads"].values():
        equality = measured["equality"]
        # As many updates as there are in an epoch.
        assert len(equality["ours"]) == len(equality["plain"]) == _NUM_IMAGES // 8
        assert equality["ours"] == pytest.approx(equality["plain"], rel=1e-5)
        assert equality["ours"][0] != equality["ours"][1]


def test_both_ways_to_train_a_head_went_over_the_same_images(report: dict[str, Any]) -> None:
    head = report["head"]
    assert head["num_rows"] == _NUM_IMAGES
    assert head["num_passes"] > 0
    assert head["network_s"]["min"] > head["cached_s"]["max"] > 0


def test_the_machine_and_the_settings_are_on_record(report: dict[str, Any]) -> None:
    assert {"cores", "cpu", "torch", "torchvision", "ray"} <= set(report["machine"])
    assert report["settings"]["compute"]["num_images"] == _NUM_IMAGES
    assert report["images"]["mean_bytes"] > 10_000


def test_the_page_for_people_names_every_way_and_ratio(report: dict[str, Any], page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    ratios = [name for measured in report["workloads"].values() for name in measured["ratios"]]
    assert all(f"| {name} |" in text for name in (*_WAYS, *ratios, "head_epoch_speedup_from_cache"))


def test_a_plain_loop_over_other_pixels_has_other_losses_which_is_an_error(tmp_path: Path) -> None:
    workspace = str(tmp_path / "workspace")
    write_digits(tmp_path / "images", _NUM_DIGITS)
    freeze(tmp_path / "images", workspace)
    shutil.copytree(tmp_path / "images", tmp_path / "others")
    for path in (tmp_path / "others").rglob("*.jpg"):
        ImageOps.mirror(Image.open(path)).save(path, quality=95)
    equal, unequal = (_compare_losses(tmp_path / tree, workspace) for tree in ("images", "others"))
    assert equal.returncode == 0, equal.stderr
    assert unequal.returncode == 1
    assert "unequal losses" in unequal.stderr


def test_an_unknown_key_is_a_usage_error_that_names_the_nearest() -> None:
    finished = _run("compute.num_image=3")
    assert finished.returncode == 2
    assert "num_images" in finished.stderr


def _compare_losses(images: Path, workspace: str) -> subprocess.CompletedProcess[str]:
    job = {"workspace": workspace, "dataset": "digits", "images": str(images), "arch": "lenet5"}
    sizes = {"crop_px": 32, "resize_px": 32, "batch_size": 8, "epochs": 1}
    settings = (f"{key}={json.dumps(value)}" for key, value in {**job, **sizes}.items())
    return _run(*settings, script="train_equality.py")


def _run(
    *settings: str, script: str = "train.py", environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(_BENCHMARKS / script), *settings],
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )
