"""The command line: its commands, its signals, and how errors become exit codes."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

import typer

from convoy.cli.inspecting import inspect_app
from convoy.cli.jobs import jobs_app
from convoy.cli.looking import looking_app
from convoy.cli.models import models_app
from convoy.cli.reports import report_app
from convoy.cli.runs import runs_app
from convoy.cli.submit import submit_app
from convoy.core.errors import ConvoyError, ExitCode

app = typer.Typer(
    name="convoy",
    help="Use ConvNets on images in object storage in every way that pays.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(jobs_app)
app.add_typer(inspect_app)
app.add_typer(looking_app)
app.add_typer(models_app, name="models")
app.add_typer(report_app, name="report")
app.add_typer(runs_app, name="runs")
app.add_typer(submit_app, name="submit")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command line; exits with a code of `ExitCode`."""
    # Where Python looks for a factory of the user's own: as with `python -m`, but after what is installed.
    sys.path.append(os.getcwd())
    for stop_signal in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stop_signal, _stop)
    try:
        app(args=list(arguments) if arguments is not None else None, standalone_mode=True)
    except ConvoyError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except _Stopped:
        print("stopped: run the same command again to go on", file=sys.stderr)
        sys.exit(ExitCode.STOPPED_RESUMABLE)


class _Stopped(BaseException):
    """The job was told to stop. No Exception: Ray Data would log one with its trace on the way up."""


def _stop(_signal: int, _frame: FrameType | None) -> None:
    raise _Stopped
