"""The benchmark of `convoy score` from end to end, at tiny sizes: it says nothing about speed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from s3_server import S3Server

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux accounts for memory in /proc"),
]

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "score.py"
NUM_IMAGES = 24
LENET = "{arch: lenet5, resize_px: 32, crop_px: 32}"
TINY = (
    "regimes=[data]",
    f"data={{network: {LENET}, num_images: {NUM_IMAGES}, batch_size: 8}}",
    "num_compared=16",
    "repeats=1",
    "workers=[0]",
    "probe_s=0.1",
    "storages=[local, swift]",
)
HEADLINES = (
    "ratio_to_bound",
    "ratio_to_remaining_bound",
    "ratio_to_ray_docs",
    "ratio_to_dataloader",
    "ratio_to_timm",
    "swift_ratio_to_local",
    "swift_ratio_to_bound",
    "first_row_s",
)


@pytest.fixture(scope="module")
def report(page: Path, s3_server: S3Server) -> dict[str, Any]:
    # The script starts a server of its own: without one that runs here all of this is skipped.
    assert s3_server
    settings = [*TINY, f"results={json.dumps(str(page))}"]
    finished = subprocess.run(
        [sys.executable, str(SCRIPT), *settings], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    printed: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return printed


def test_the_headlines_of_a_regime_are_there_and_positive(report: dict[str, Any]) -> None:
    assert all(report["data"][name] > 0 for name in HEADLINES)


def test_our_float32_logits_equal_those_of_every_peer(report: dict[str, Any]) -> None:
    equality = report["measured"]["data"]["equality"]
    assert set(equality) == {"ray_docs", "dataloader_workers_0", "timm_workers_0"}
    assert all(one["min_centred_cosine"] > 0.99 for one in equality.values())


def test_memory_of_driver_and_workers_was_sampled_and_plotted(report: dict[str, Any], page: Path) -> None:
    (details,) = report["measured"]["data"]["ways"]["ours"]["details"]
    samples = details["memory_s_driver_workers_mib"]
    assert max(driver for _, driver, _ in samples) > 100
    assert max(workers for _, _, workers in samples) > 100
    # Of so few images the samples under way may be too few to tell.
    assert details["others_share"] is None or 0 < details["others_share"] < 1
    assert page.with_name("results-data.png").stat().st_size > 10_000


def test_the_page_names_every_way(report: dict[str, Any], page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert all(f"| {way} |" in text for way in report["measured"]["data"]["ways"])
