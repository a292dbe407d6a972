"""Progress on stderr: a bar on a terminal, sparse lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 15.0


class TerminalProgress:
    """Shows images/s, rejects and the remaining time. Use as a context manager."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._total = self._done = self._finished_now = self._rejects = 0
        self._started_s = self._last_line_s = time.monotonic()

    def __enter__(self) -> TerminalProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def stage(self, text: str) -> None:
        """The job enters a stage that has no known length."""
        if self._bar.disable:
            self._line(text)
        elif self._task is None:
            self._task = self._bar.add_task(text, total=None, note="")
        else:
            self._bar.update(self._task, description=text)

    def start(self, total_samples: int, done_samples: int) -> None:
        """Work on samples begins."""
        self._total, self._done, self._finished_now = total_samples, done_samples, 0
        self._started_s = self._last_line_s = time.monotonic()
        self.stage("images")
        if self._task is not None:
            self._bar.update(self._task, total=total_samples, completed=done_samples)

    def advance(self, results: int, rejects: int) -> None:
        """Samples were finished."""
        self._done += results + rejects
        self._finished_now += results + rejects
        self._rejects += rejects
        now_s = time.monotonic()
        rate = self._finished_now / max(now_s - self._started_s, 1e-9)
        note = f"{rate:,.0f} images/s, {self._rejects:,} rejects"
        if self._task is not None:
            self._bar.update(self._task, completed=self._done, note=note)
        elif now_s - self._last_line_s >= _SECONDS_BETWEEN_LINES:
            self._last_line_s = now_s
            remaining_s = (self._total - self._done) / max(rate, 1e-9)
            self._line(f"{self._done:,} of {self._total:,} images, {note}, {remaining_s:,.0f} s left")

    def _line(self, text: str) -> None:
        print(f"convoy: {text}", file=sys.stderr, flush=True)
