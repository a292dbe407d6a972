"""The benchmark of pages from end to end, on few images: it says nothing about speed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chromium import find_browser
from command_lines import convoy_json, settings_arguments

pytestmark = pytest.mark.integration


def test_the_page_of_an_evaluation_is_measured_and_looked_at_where_a_browser_is(
    page: Path, ray_cluster: dict[str, str]
) -> None:
    shots = page.parent / "shots"
    settings = ["num_images=60", "num_classes=4", f"screenshots={json.dumps(str(shots))}"]
    settings.append(f"results={json.dumps(str(page))}")
    report = convoy_json("bench", "report", *settings_arguments(*settings), environment=ray_cluster)
    assert next(iter(report)) == "size_mb"
    assert 0.01 < report["size_mb"] < 5
    text = page.read_text(encoding="utf-8")
    assert "60 images of 4 classes" in text
    has_browser = find_browser() is not None
    assert (report["load_s"] is not None) is has_browser is ("until it is loaded" in text)
    if has_browser:
        assert report["load_s"] > 0
        assert report["elements"] > 300
        assert {path.name for path in shots.iterdir()} == {"light.png", "dark.png"}
