"""What the tests of faults share: a Ray behind the fault proxy, and the table of faults that pytest prints last."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from chaos_jobs import FAULT, FaultTable

HEADINGS = ("fault", "fired", "lost", "doubled", "digest equal")


@pytest.fixture
def fault_table(record_property: Callable[[str, object], None]) -> FaultTable:
    """The table that is printed at the end."""
    return FaultTable(record_property)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    calls = [report for report in reports if getattr(report, "when", None) == "call"]
    rows = [HEADINGS, *(row for call in calls for name, row in call.user_properties if name == FAULT)]
    if len(rows) == 1:
        return
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    terminalreporter.section("faults")
    for row in rows:
        first, *others = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        terminalreporter.write_line("  ".join([first, *others]).rstrip())
