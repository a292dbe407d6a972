"""Progress on stderr: a bar on a terminal, sparse lines elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Sequence
from types import TracebackType

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table

from convoy.core.training_events import EpochResult, TrainingEvent
from convoy.core.trial_events import TrialStatus
from convoy.report.stillness import Stillness
from convoy.report.trial_table import TrialLines, trial_table

_SECONDS_BETWEEN_LINES = 15.0
# Small datasets have several epochs a second.
_SECONDS_BETWEEN_EPOCHS = 2.0
_SECONDS_BETWEEN_LOOKS = 5.0


class _Bars(Progress):
    """Bars with room for a table above them."""

    table: Table | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        """The table, if there is one, and the bars."""
        if self.table is not None:
            yield self.table
        yield self.make_tasks_table(self.tasks)


class TerminalProgress:
    """Shows images/s, rejects and the remaining time. Use as a context manager."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._bar = _Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._total = self._done = self._finished_now = self._rejects = 0
        self._started_s = self._last_line_s = time.monotonic()
        self._last_epoch_s = 0.0
        self._last_val_top1: float | None = None
        self._trial_lines = TrialLines()
        # While images are worked on; the lock is for what two threads tell it and ask it.
        self._stillness: Stillness | None = None
        self._lock = threading.Lock()
        self._has_ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="progress", daemon=True)

    def __enter__(self) -> TerminalProgress:
        self._bar.start()
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._has_ended.set()
        self._watcher.join()
        self._bar.stop()

    def stage(self, text: str) -> None:
        """The job enters a stage that has no known length."""
        self._stillness = None
        if self._bar.disable:
            self._line(text)
            return
        if self._task is not None:
            # A bar cannot be told to forget its total, and the note of the stage before says nothing of this one.
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(text, total=None, note="")

    def start(self, total_samples: int, done_samples: int) -> None:
        """Work on samples begins."""
        self._total, self._done, self._finished_now, self._rejects = total_samples, done_samples, 0, 0
        self._started_s = self._last_line_s = time.monotonic()
        self.stage("images")
        self._stillness = Stillness(self._started_s)
        if self._task is not None:
            self._bar.update(self._task, total=total_samples, completed=done_samples)

    def advance(self, results: int, rejects: int) -> None:
        """Samples were finished."""
        self._done += results + rejects
        self._finished_now += results + rejects
        self._rejects += rejects
        now_s = time.monotonic()
        with self._lock:
            if self._stillness is not None:
                self._stillness.finished(now_s)
        rate = self._finished_now / max(now_s - self._started_s, 1e-9)
        remaining_s = (self._total - self._done) / max(rate, 1e-9)
        note = f"{rate:,.0f} images/s, {self._rejects:,} rejects, {remaining_s:,.0f} s left"
        if self._task is not None:
            self._bar.update(self._task, completed=self._done, note=note)
        elif now_s - self._last_line_s >= _SECONDS_BETWEEN_LINES:
            self._last_line_s = now_s
            self._line(f"{self._done:,} of {self._total:,} images, {note}")

    def training(self, event: TrainingEvent) -> None:
        """A training went on: a line for an epoch, at most every other second, and a bar or sparse lines between."""
        for note in event.notes:
            self._note(note)
        is_epoch_due = time.monotonic() - self._last_epoch_s >= _SECONDS_BETWEEN_EPOCHS
        if event.result is not None and (is_epoch_due or not event.steps_left):
            self._last_epoch_s = self._last_line_s = time.monotonic()
            self._note(_epoch_line(event.result, event.num_epochs))
        if event.result is not None and event.result.val_top1 is not None:
            self._last_val_top1 = event.result.val_top1
        where = f"{event.phase}, epoch {event.epoch} of {event.num_epochs}"
        pace = _pace(event, self._last_val_top1)
        if not self._bar.disable:
            self._draw_steps(event, where, pace)
        elif event.result is None and time.monotonic() - self._last_line_s >= _SECONDS_BETWEEN_LINES:
            self._last_line_s = time.monotonic()
            self._line(f"{where}, step {event.step} of {event.num_steps}: {pace}")

    def trials(self, statuses: Sequence[TrialStatus]) -> None:
        """A trial of a search began, went on or ended: a table, or a line where there is no terminal."""
        if not self._bar.disable:
            self._bar.table = trial_table(statuses)
            return
        for line in self._trial_lines.news(statuses):
            self._line(line)

    def _watch(self) -> None:
        while not self._has_ended.wait(_SECONDS_BETWEEN_LOOKS):
            with self._lock:
                line = self._stillness and self._stillness.news(time.monotonic())
            if line:
                self._note(line)

    def _draw_steps(self, event: TrainingEvent, where: str, pace: str) -> None:
        """The bar over the steps of all epochs."""
        if self._task is None:
            self._task = self._bar.add_task(where, total=None, note="")
        total = event.num_epochs * event.num_steps
        done = total - event.steps_left
        self._bar.update(self._task, description=where, total=total, completed=done, note=pace)

    def _note(self, text: str) -> None:
        """A line that stays."""
        if self._bar.disable:
            self._line(text)
        else:
            self._bar.console.print(f"convoy: {text}", highlight=False, markup=False, soft_wrap=True)

    def _line(self, text: str) -> None:
        print(f"convoy: {text}", file=sys.stderr, flush=True)


def _epoch_line(result: EpochResult, num_epochs: int) -> str:
    val = ""
    if result.val_top1 is not None and result.val_nll is not None:
        val = f", val top-1 {result.val_top1:.4f}, val NLL {result.val_nll:.4f}"
    return (
        f"{result.phase}, epoch {result.epoch} of {num_epochs}: loss {result.train_loss:.4f},"
        f" top-1 {result.train_top1:.4f}{val}, {result.images_per_s:,.0f} images/s, {result.seconds:,.0f} s"
    )


def _pace(event: TrainingEvent, last_val_top1: float | None) -> str:
    loss = "" if event.train_loss is None else f"loss {event.train_loss:.4f}, "
    val = "" if last_val_top1 is None else f"val top-1 {last_val_top1:.4f}, "
    left = "" if event.seconds_left is None else f", {event.seconds_left:,.0f} s left"
    return f"{loss}{val}{event.images_per_s:,.0f} images/s{left}"
