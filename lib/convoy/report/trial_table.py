"""The trials of a search on a terminal: a table that is drawn anew, or a line where one begins, goes on or ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table

from convoy.core.trial_events import TrialState, TrialStatus

_MAX_ROWS = 20
_MAX_VALUE_CHARACTERS, _MAX_VALUES_CHARACTERS = 24, 48


def trial_table(statuses: Sequence[TrialStatus]) -> Table:
    """Running trials first, then the others from the best validation top-1 down; at most 20."""
    keys = list(dict.fromkeys(key for status in statuses for key in status.values))
    names = short_names(keys)
    ended = len([status for status in statuses if status.state is not TrialState.RUNNING])
    table = Table(title=f"{len(statuses)} trials, {ended} ended", title_justify="left")
    for column in ("trial", "state", *(names[key] for key in keys), "epoch", "val top-1", "images/s"):
        table.add_column(column, overflow="fold")
    for status in sorted(statuses, key=_rank)[:_MAX_ROWS]:
        table.add_row(
            status.trial,
            status.state.value,
            *(shown_value(status.values.get(key)) for key in keys),
            "" if status.epoch is None else str(status.epoch),
            "" if status.top1 is None else f"{status.top1:.4f}",
            "" if status.images_per_s is None else f"{status.images_per_s:,.0f}",
        )
    if len(statuses) > _MAX_ROWS:
        table.caption = f"{len(statuses) - _MAX_ROWS} more"
    return table


class TrialLines:
    """What is new about trials, as lines for a log."""

    def __init__(self) -> None:
        self._told: dict[str, tuple[TrialState, int | None]] = {}

    def news(self, statuses: Sequence[TrialStatus]) -> Iterator[str]:
        """A line for each trial that began, finished an epoch, or ended since the last call."""
        for status in statuses:
            now = (status.state, status.epoch)
            if self._told.get(status.trial) != now:
                is_new = status.trial not in self._told
                self._told[status.trial] = now
                yield _line(status, is_new=is_new)


def describe_values(values: dict[str, Any]) -> str:
    """What a search chose for a trial, in one line: the keys by their shortest unmistakable ends."""
    names = short_names(list(values))
    return ", ".join(f"{names[key]} {shown_value(value)}" for key, value in values.items())


def _line(status: TrialStatus, *, is_new: bool) -> str:
    top1 = "" if status.top1 is None else f", val top-1 {status.top1:.4f}"
    reason = f": {status.reason.splitlines()[0]}" if status.reason else ""
    if status.state is not TrialState.RUNNING:
        return f"trial {status.trial} {status.state.value}{top1}{reason}"
    if status.epoch is None or is_new:
        return f"trial {status.trial} begins: {describe_values(status.values)}"
    return f"trial {status.trial}, epoch {status.epoch}{top1}"


def _rank(status: TrialStatus) -> tuple[bool, float]:
    return status.state is not TrialState.RUNNING, -(status.top1 or 0.0)


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """The last part of each dotted key, or the whole key where two end alike."""
    ends = [key.rpartition(".")[2] for key in keys]
    return {key: end if ends.count(end) == 1 else key for key, end in zip(keys, ends, strict=True)}


def shown_value(value: Any) -> str:
    """A value of a search space in few characters."""
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict):
        # Keys say less than what they are set to; but settings may differ in any of theirs.
        texts = (shown_value(value[key]) for key in sorted(value, key=lambda key: key != "arch"))
        text = " ".join(texts)
        return text if len(text) <= _MAX_VALUES_CHARACTERS else f"{text[: _MAX_VALUES_CHARACTERS - 1]}…"
    text = str(value)
    if len(text) <= _MAX_VALUE_CHARACTERS:
        return text
    return f"…{text[1 - _MAX_VALUE_CHARACTERS :]}"
