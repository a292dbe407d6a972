"""The benchmark of planning from end to end, at small sizes: it says nothing about speed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from command_lines import convoy_json, settings_arguments

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux accounts for memory in /proc"),
]

NUM_ROWS = 20_000


@pytest.fixture(scope="module")
def report(page: Path) -> dict[str, Any]:
    settings = ["repeats=1", "jobs=[score, cache]", f"results={json.dumps(str(page))}"]
    return convoy_json("bench", "plan", "--rows", str(NUM_ROWS), *settings_arguments(*settings))


def test_time_and_memory_of_planning_and_resuming_come_first(report: dict[str, Any]) -> None:
    assert list(report)[:4] == ["seconds", "peak_rss_mib", "resume_seconds", "resume_peak_rss_mib"]
    assert all(report[name] > 0 for name in list(report)[:4])
    largest = report["cases"]["score"][-1]
    assert (largest["rows"], largest["seconds"]) == (NUM_ROWS, report["seconds"])


def test_every_case_has_every_size_and_a_slope_between(report: dict[str, Any]) -> None:
    assert set(report["cases"]) == {"score", "resume", "new", "grown"}
    for case, rows in report["cases"].items():
        assert [row["rows"] for row in rows] == [10_000, NUM_ROWS]
        (slope,) = report["slopes"][case]
        assert (slope["from_rows"], slope["to_rows"]) == (10_000, NUM_ROWS)


def test_half_of_the_slices_were_recorded(report: dict[str, Any]) -> None:
    for stored in report["stored"]:
        assert stored["records"] == -(-stored["slices"] // 2) > 0
        assert stored["input_shards"] == 1


def test_the_page_has_a_table_for_each_case(report: dict[str, Any], page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert all(f"## {case}:" in text for case in report["cases"])
    assert text.count(f"| {NUM_ROWS} |") >= len(report["cases"])
