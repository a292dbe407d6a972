"""Trials of a search: a table on a terminal, news as lines elsewhere."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from convoy.core.trial_events import TrialState, TrialStatus
from convoy.report import progress
from convoy.report.progress import TerminalProgress
from convoy.report.trial_table import TrialLines, describe_values, trial_table

VALUES = {"backbone": {"arch": "cifar_resnet20", "weights": "a.th"}, "learning_rate": 0.012345}


def status(trial: str, state: TrialState = TrialState.RUNNING, **fields: Any) -> TrialStatus:
    return TrialStatus(trial=trial, state=state, values=VALUES, **fields)


def test_lines_tell_each_piece_of_news_once() -> None:
    lines = TrialLines()
    assert list(lines.news([status("001")])) == [
        "trial 001 begins: backbone cifar_resnet20 a.th, learning_rate 0.0123"
    ]
    assert list(lines.news([status("001")])) == []
    assert list(lines.news([status("001", epoch=1, top1=0.5)])) == ["trial 001, epoch 1, val top-1 0.5000"]
    ended = [
        status("001", TrialState.FINISHED, epoch=1, top1=0.625),
        status("002", TrialState.FAILED, reason="the loss is no finite number"),
    ]
    assert list(lines.news(ended)) == [
        "trial 001 finished, val top-1 0.6250",
        "trial 002 failed: the loss is no finite number",
    ]
    assert list(lines.news(ended)) == []


def test_keys_are_named_by_their_ends_unless_two_end_alike() -> None:
    assert describe_values({"recipe.seed": 1, "learning_rate": 0.5}) == "seed 1, learning_rate 0.5"
    assert describe_values({"recipe.seed": 1, "rows.seed": 2}) == "recipe.seed 1, rows.seed 2"


def test_settings_that_differ_in_any_key_look_different() -> None:
    crops = [{"kind": "random_resized", "area": {"low": low, "high": 1}} for low in (0.08, 0.5)]
    assert [describe_values({"crop": crop}) for crop in crops] == [
        "crop random_resized 0.08 1",
        "crop random_resized 0.5 1",
    ]
    assert describe_values({"backbone": {"weights": "w", "arch": "resnet50"}}) == "backbone resnet50 w"
    many = describe_values({"policy": {str(number): number for number in range(100)}})
    assert len(many) == len("policy ") + 48


def test_running_trials_stand_first_then_the_best() -> None:
    statuses = [
        status("001", TrialState.FINISHED, top1=0.5),
        status("002", TrialState.FINISHED, top1=0.75),
        status("003", TrialState.FAILED),
        status("004"),
    ]
    table = trial_table(statuses)
    assert list(table.columns[0].cells) == ["004", "002", "001", "003"]
    assert table.title == "4 trials, 3 ended"
    assert [column.header for column in table.columns][2:4] == ["backbone", "learning_rate"]


def test_a_large_search_does_not_fill_the_screen() -> None:
    table = trial_table([status(f"{number:03}", TrialState.FINISHED) for number in range(100)])
    assert table.row_count == 20
    assert table.caption == "80 more"


def test_a_terminal_shows_the_table_and_a_log_the_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with TerminalProgress() as shown:
        shown.trials([status("001")])
    assert capsys.readouterr().err.startswith("convoy: trial 001 begins")

    monkeypatch.setenv("TERM", "xterm")
    screen = io.StringIO()
    monkeypatch.setattr(
        progress, "Console", lambda *, stderr: Console(file=screen, force_terminal=True, width=120)
    )
    with TerminalProgress() as shown:
        shown.trials([status("001", epoch=2, top1=0.5, images_per_s=1234.0)])
    text = screen.getvalue()
    assert "val top-1" in text
    assert "0.5000" in text
    assert "1,234" in text
    assert "begins" not in text
