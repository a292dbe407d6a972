"""What the tests of faults share: a Ray behind the fault proxy, and the table of faults that pytest prints last."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from chaos_jobs import FAULT, FaultTable
from fault_proxy import FaultProxy
from s3_server import OVERRIDING_VARIABLES

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


@pytest.fixture(scope="module")
def s3_behind_proxy(fault_proxy: FaultProxy) -> Iterator[FaultProxy]:
    """The environment of this process, and of all that it starts, points at the S3 server through the proxy."""
    with pytest.MonkeyPatch.context() as patch:
        for name in OVERRIDING_VARIABLES:
            patch.delenv(name, raising=False)
        for name, value in fault_proxy.as_server().environment().items():
            patch.setenv(name, value)
        yield fault_proxy


@pytest.fixture(scope="module")
def ray_behind_proxy(s3_behind_proxy: FaultProxy, ray_cluster: dict[str, str]) -> None:
    """A Ray that is open in this process, whose workers ask the S3 server through the proxy."""
