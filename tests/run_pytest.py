"""Run pytest with the arguments given, and end the process with its exit code as soon as pytest has.

Ray, DuckDB and ONNX Runtime leave threads of their own behind. While C++ takes its globals down these have crashed the
process now and then, after the summary, so that `make test` failed though every test had passed.

Ray's C++ also ends a process outright, as where its new raylet or an old head does not answer. Where this takes a
process of pytest-xdist, the tests that have not ended run once more; a second time it is a failure.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

_IS_SECOND = "CONVOY_TESTS_AFTER_A_CRASH"


class Crashes:
    """A plugin that notes in which tests processes died, whether anything else failed, and what came to no end."""

    def __init__(self) -> None:
        self.died: list[str] = []
        self.has_failures = False
        self._collected: list[str] = []
        self._ended: set[str] = set()

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self._collected = list(ids)

    @pytest.hookimpl(optionalhook=True)
    def pytest_handlecrashitem(self, crashitem: str) -> None:
        print(f"\nits process died: {crashitem}", flush=True)
        self.died.append(crashitem)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.has_failures |= report.failed

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # That of a crash is of none of the three.
        self.has_failures |= report.failed and report.when in ("setup", "call", "teardown")
        if report.when == "teardown":
            self._ended.add(report.nodeid)

    @property
    def unfinished(self) -> list[str]:
        """The tests that have not ended."""
        return [test for test in self._collected if test not in self._ended]


def main() -> None:
    """Call pytest; no destructor of a library runs after it."""
    arguments, crashes = sys.argv[1:], Crashes()
    exit_code = pytest.main(arguments, plugins=[crashes])
    is_crash_alone = exit_code == pytest.ExitCode.TESTS_FAILED and crashes.died and not crashes.has_failures
    if is_crash_alone and crashes.unfinished and _IS_SECOND not in os.environ:
        died = ", ".join(crashes.died)
        print(f"a process died in {died}: once more {len(crashes.unfinished)} tests", flush=True)
        options = [one for one in arguments if not Path(one.partition("::")[0]).exists()]
        os.environ[_IS_SECOND] = "1"
        os.execv(sys.executable, [sys.executable, __file__, *options, *crashes.unfinished])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


if __name__ == "__main__":
    main()
