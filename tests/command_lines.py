"""Convoy's command line, run as a person runs it, or in the process of the test, which starts ten times as fast."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from convoy.cli.main import main

CONVOY = Path(sys.executable).parent / "convoy"
TIMEOUT_S = 300


def convoy(
    *arguments: str, environment: Mapping[str, str] | None = None, timeout_s: float = TIMEOUT_S
) -> subprocess.CompletedProcess[str]:
    """One command line, to its end."""
    return subprocess.run(
        [str(CONVOY), *arguments],
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def convoy_here(*arguments: str) -> subprocess.CompletedProcess[str]:
    """One command line in this process, on the Ray that is open in it: saves most of a short job's time."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    stdout, stderr = io.StringIO(), io.StringIO()
    code: Any = 0
    try:
        with redirect_stdout(stdout), redirect_stderr(stderr):
            main(arguments)
    except SystemExit as ended:
        code = ended.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return subprocess.CompletedProcess(arguments, int(code or 0), stdout.getvalue(), stderr.getvalue())


def convoy_json(
    *arguments: str, environment: Mapping[str, str] | None = None, timeout_s: float = TIMEOUT_S
) -> dict[str, Any]:
    """The JSON of a command that must succeed."""
    return report_of(convoy(*arguments, "--json", environment=environment, timeout_s=timeout_s))


def convoy_json_here(*arguments: str) -> dict[str, Any]:
    """The JSON of a command that must succeed, in this process."""
    return report_of(convoy_here(*arguments, "--json"))


def report_of(finished: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The JSON that a command printed last; it must have succeeded."""
    assert finished.returncode == 0, finished.stderr
    return last_json(finished)


def last_json(finished: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The JSON that a command printed last, whatever its exit code."""
    report: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return report


def settings_arguments(*settings: str) -> list[str]:
    """The settings as `--set` arguments."""
    return [argument for setting in settings for argument in ("--set", setting)]
