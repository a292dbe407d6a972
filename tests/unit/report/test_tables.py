"""Reports as text on a terminal."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel

from convoy.report.advice_text import print_advice
from convoy.report.tables import print_report
from made_advice import made_advice


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


def test_the_confusion_of_a_few_classes_and_intervals_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    recall = {"estimate": 0.9, "low": 0.8, "high": 0.95, "confidence": 0.95}
    report = Report(
        top1=0.5, classes=["cat", "dog"], confusion=[[31, 4], [7, 58]], by_class=[{"recall": recall}]
    )
    print_report(report)
    lines = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    assert ["0", "cat", "31", "4"] in lines
    assert ["1", "dog", "7", "58"] in lines
    assert ["0.8", "to", "0.95"] in lines


def test_advice_is_a_short_text_and_the_command_for_its_page(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    print_advice(made_advice(), workspace="s3://bucket/work")
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) < 80
    for words in (
        "fine_tune",
        "85.00 to 95.00 %",
        "30 s to 2 min",
        "collect",
        "for 95.00 %",
        "2 x the images",
        "resolution no image could be measured",
        "what it expects is no forecast of a top-1 at this budget",
    ):
        assert words in " ".join(shown.split())
    assert shown.splitlines()[-1] == "All of the evidence: convoy report r --workspace s3://bucket/work"
    assert "{" not in shown


def test_names_of_classes_do_not_steer_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ESC ] 0 ; sets the title of a window, ESC [ 2 J clears it, and U+202E turns the line around."""
    monkeypatch.setenv("COLUMNS", "200")
    name = "cat\x1b]0;mine\x07\x1b[2J\u202e"
    print_report(
        Report(
            top1=0.5,
            classes=[name, "dog"],
            confusion=[[31, 4], [7, 58]],
            by_class=[{"name": name, "counts": {name: 3}}],
        )
    )
    advice = made_advice()
    strategies = [one.model_copy(update={"backbone": name}) for one in advice.strategies]
    print_advice(advice.model_copy(update={"notes": [name], "strategies": strategies}), workspace=None)
    shown = capsys.readouterr().out
    assert not any(character in shown for character in "\x1b\x07\u202e")
    assert shown.count("\\u001b") >= 8
