"""Progress of a training: a line an epoch where there is no terminal, a bar and the same lines where there is."""

from __future__ import annotations

import io
import sys
import time

import pytest
from rich.console import Console

from convoy.report import progress
from convoy.report.progress import TerminalProgress
from made_events import epoch_result, training_event

RESULT = epoch_result()
LINE = "body, epoch 2 of 3: loss 0.5000, top-1 0.7500, val top-1 0.7000, val NLL 0.6250, 250 images/s, 4 s"


def test_without_a_terminal_epochs_and_notes_are_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with TerminalProgress() as shown:
        shown.training(training_event(notes=("going on from the checkpoint of step 12",)))
        shown.training(training_event(result=RESULT))
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == [
        "convoy: going on from the checkpoint of step 12",
        f"convoy: {LINE}",
    ]


def test_without_a_terminal_images_have_pace_rejects_and_time_left_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now_s)
    with TerminalProgress() as shown:
        for begun_s in (0.0, 100.0):
            now_s = begun_s
            shown.start(1000, 200)
            for now_s in (begun_s + 1.0, begun_s + 20.0):  # noqa: B007 (the clock reads it)
                shown.advance(95, 5)
    told = "400 of 1,000 images, 10 images/s, 10 rejects, 60 s left"
    assert capsys.readouterr().err.splitlines() == ["convoy: images", f"convoy: {told}"] * 2


def test_without_a_terminal_a_long_epoch_is_told_of_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now_s)
    with TerminalProgress() as shown:
        for now_s in (1.0, 16.0, 17.0):  # noqa: B007 (the clock reads it)
            shown.training(training_event())
    assert capsys.readouterr().err.splitlines() == [
        "convoy: body, epoch 2 of 3, step 5 of 10: loss 0.5000, 250 images/s, 60 s left"
    ]


def test_many_short_epochs_do_not_flood_a_log(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now_s)
    with TerminalProgress() as shown:
        for _ in range(10):
            shown.training(training_event(result=RESULT))
        shown.training(training_event(result=RESULT, steps_left=0))
    assert len(capsys.readouterr().err.splitlines()) == 2  # the first, and the end


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a terminal is sent."""
    monkeypatch.setenv("TERM", "xterm")
    sent = io.StringIO()

    def terminal(*, stderr: bool) -> Console:
        assert stderr
        return Console(file=sent, force_terminal=True, width=160)

    monkeypatch.setattr(progress, "Console", terminal)
    return sent


def test_a_terminal_shows_phase_epoch_pace_and_keeps_a_line_an_epoch(screen: io.StringIO) -> None:
    with TerminalProgress() as shown:
        shown.stage("starting the training workers")
        shown.training(training_event())
        shown.training(training_event(result=RESULT))
        shown.training(training_event(epoch=3))
    text = screen.getvalue()
    assert "body, epoch 2 of 3" in text
    assert "15/30" in text
    assert "loss 0.5000, val top-1 0.7000, 250 images/s, 60 s left" in text
    assert text.count(LINE) == 1


def test_a_later_stage_does_not_keep_the_figures_of_the_training(screen: io.StringIO) -> None:
    with TerminalProgress() as shown:
        shown.stage("starting the training workers")
        shown.training(training_event())
        shown.stage("predicting")
    last = screen.getvalue().rpartition("predicting")[2]
    assert "0/?" in last
    assert "loss" not in last
    assert "15/30" not in last


def test_a_job_that_finishes_nothing_says_so_until_it_does_something_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_s = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now_s)
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LOOKS", 0.01)
    # Not capsys, which empties what it reads and loses what another thread prints meanwhile.
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    with TerminalProgress() as shown:
        shown.start(100, 0)
        now_s = 130.0
        deadline_s = time.perf_counter() + 60
        while "finished" not in stderr.getvalue() and time.perf_counter() < deadline_s:
            time.sleep(0.01)
        shown.stage("committing")
        now_s = 1000.0
        time.sleep(0.1)
    assert stderr.getvalue().splitlines() == [
        "convoy: images",
        "convoy: no slice has been finished for 130 s",
        "convoy: committing",
    ]
