"""Reports as text on a terminal."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel

from convoy.report.tables import print_report


class Report(BaseModel):
    """Of an evaluation, as large as its classes are many."""

    top1: float
    classes: list[str]
    confusion: list[list[int]]
    by_class: list[dict[str, Any]]


def test_a_report_of_many_classes_fits_a_screen(capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"class {number}" for number in range(1000)]
    report = Report(
        top1=0.5, classes=names, confusion=[[0] * 1000] * 1000, by_class=[{"name": name} for name in names]
    )
    print_report(report)
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) < 60
    assert shown.count("1000 entries: use --json") == 2
    assert "960 more" in shown


def test_a_short_list_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    print_report(Report(top1=0.5, classes=["cat", "dog"], confusion=[], by_class=[]))
    assert "cat, dog" in capsys.readouterr().out
