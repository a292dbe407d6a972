"""Reports as text for people: one key a line, tables for lists of records."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from convoy.core.statistics import Interval
from convoy.report.hidden_characters import with_codes

_MAX_ROWS = 40
_MAX_VALUES = 20
_INTERVAL_KEYS = set(Interval.model_fields)


def print_report(report: BaseModel) -> None:
    """Print a report to stdout: its values, then its tables, and the confusion of a few classes."""
    console = Console(markup=False, highlight=False)
    values = report.model_dump(mode="json")
    summary = Table(show_header=False, box=None, pad_edge=False)
    summary.add_column(style="bold")
    summary.add_column(overflow="fold")
    for key, value in values.items():
        if not (_is_table(value) or _is_matrix(value)) and value not in (None, {}, []):
            summary.add_row(key, _cell(value))
    console.print(summary)
    for key, value in values.items():
        if _is_table(value):
            console.print(_table(key, value))
        elif _is_matrix(value):
            console.print(_matrix(key, value, values.get("classes") or []))


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _is_matrix(value: Any) -> bool:
    is_square = isinstance(value, list) and all(
        isinstance(row, list) and len(row) == len(value) for row in value
    )
    return is_square and 0 < len(value) <= _MAX_VALUES


def _matrix(title: str, rows: list[list[int]], classes: list[str]) -> Table:
    """Rows are true classes, columns predicted ones, by number."""
    table = Table(title=f"{title}: a row for each true class", title_justify="left")
    table.add_column("")
    for index in range(len(rows)):
        table.add_column(str(index), justify="right")
    for index, row in enumerate(rows):
        name = f"{index} {with_codes(classes[index])}" if len(classes) == len(rows) else str(index)
        table.add_row(name, *map(str, row))
    return table


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in rows[0]:
        table.add_column(column, overflow="fold")
    for row in rows[:_MAX_ROWS]:
        table.add_row(*(_cell(value) for value in row.values()))
    if len(rows) > _MAX_ROWS:
        table.caption = f"{len(rows) - _MAX_ROWS} more rows: use --json"
    return table


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict) and value.keys() == _INTERVAL_KEYS:
        return f"{_cell(value['low'])} to {_cell(value['high'])}"
    if isinstance(value, dict):
        return ", ".join(f"{_cell(key)} {_cell(item)}" for key, item in value.items())
    if isinstance(value, list):
        if len(value) > _MAX_VALUES or any(isinstance(item, list) for item in value):
            return f"{len(value)} entries: use --json"
        return ", ".join(_cell(item) for item in value)
    return with_codes(str(value))
