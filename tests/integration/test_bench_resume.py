"""The benchmark of resuming from end to end, at a small size: it says nothing about speed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from command_lines import convoy_json, settings_arguments

pytestmark = [pytest.mark.integration, pytest.mark.slow]

NUM_IMAGES = 2048


@pytest.fixture(scope="module")
def report(page: Path) -> dict[str, Any]:
    settings = [
        f"num_images={NUM_IMAGES}",
        "batch_size=16",
        "killed_at=0.2",
        "repeats=1",
        f"results={json.dumps(str(page))}",
    ]
    return convoy_json("bench", "resume", *settings_arguments(*settings))


def test_the_ratios_come_first(report: dict[str, Any]) -> None:
    names = ["finished_again_ratio", "finished_again_wall_ratio", "killed_wall_ratio"]
    assert list(report)[:3] == names
    assert all(report[name] > 0 for name in names)


def test_only_what_was_not_recorded_was_computed_again(report: dict[str, Any]) -> None:
    (repeat,) = report["repeats"]
    assert repeat["recorded_rows"] >= 0.2 * NUM_IMAGES
    assert 0 < repeat["recomputed_rows"] <= NUM_IMAGES - repeat["recorded_rows"]


def test_the_page_has_ratios_and_seconds(report: dict[str, Any], page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert all(f"| {name} |" in text for name in (*report["ratios"], "full_wall_s", "recomputed_rows"))
