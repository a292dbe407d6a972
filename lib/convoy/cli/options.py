"""What the commands share: their options, and how a job is run and its report printed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Annotated, TypeVar

import typer
from pydantic import BaseModel

from convoy.core.config import as_override, parse_config
from convoy.core.errors import ErrorBudgetExceeded, ExitCode
from convoy.core.json_values import finite_or_null
from convoy.pipelines.config_files import read_job_settings
from convoy.report.progress import TerminalProgress
from convoy.report.tables import print_report

ConfigOption = Annotated[
    str | None, typer.Option("--config", "-c", help="YAML file of the job, or its s3:// URI.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", "-s", help="Override a key: section.key=value. Repeatable.")
]
WorkspaceOption = Annotated[
    str | None,
    typer.Option(
        "--workspace", "-w", help="Folder or s3:// URI. Default: the config, CONVOY_WORKSPACE, ./workspace."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object last on stdout.")]
NewRunOption = Annotated[
    bool,
    typer.Option("--new-run", help="Leave an unfinished run of the same target, and start afresh."),
]
RedoOption = Annotated[
    bool,
    typer.Option("--new-run", help="Leave a run of the same target, also a finished one, and start afresh."),
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what would be done; no run begins.")]
ScoreDryRunOption = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Time a sample, whose scores are thrown away, and say what all would take. A --source is frozen.",
    ),
]

ReportT = TypeVar("ReportT", bound=BaseModel)
ConfigT = TypeVar("ConfigT", bound=BaseModel)


def load(
    model: type[ConfigT],
    path: str | None,
    overrides: Sequence[str] | None,
    workspace: str | None,
    *,
    options: Collection[str] = (),
) -> ConfigT:
    """The settings of a job: its file, what was `--set`, and the workspace that was named, which wins.

    `options` as in `parse_config`.
    """
    settings = read_job_settings(path, [*(overrides or []), *words(workspace=workspace)])
    return parse_config(model, settings, where=path or "--set", options=options)


def words(**values: object) -> list[str]:
    """What was said on the command line, as overrides of the keys; those that come last win."""
    return [as_override(key, value) for key, value in values.items() if value is not None]


def run_job(
    job: Callable[[TerminalProgress], ReportT],
    *,
    as_json: bool,
    if_empty: str = "",
    print_text: Callable[[ReportT], None] = print_report,
) -> None:
    """Run a job, print its report, and turn a broken promise of the report into the exit code.

    `if_empty` is what people are told in place of a report that has nothing to say; `print_text` prints all others.
    """
    with TerminalProgress() as progress:
        report = job(progress)
    if as_json:
        print(json.dumps(finite_or_null(report.model_dump(mode="json")), allow_nan=False), flush=True)
    elif if_empty and not any(report.model_dump().values()):
        print(if_empty)
    else:
        print_text(report)
    if not getattr(report, "within_error_budget", True):
        unfetched = getattr(report, "unfetched", 0)
        again = (
            f"; after convoy runs repair {getattr(report, 'run', 'RUN')} --retry-unfetched --apply the same command"
            f" tries the {unfetched} again that could not be fetched"
            if unfetched
            else ""
        )
        raise ErrorBudgetExceeded(
            "more samples were rejected than the error budget allows; the results are kept",
            next_step=f"look at the rejects of the run, then mend the data or raise error_budget{again}",
        )
    if not getattr(report, "ok", True):
        sys.exit(ExitCode.ERROR)
    exit_code = getattr(report, "process_exit_code", ExitCode.OK)
    if exit_code != ExitCode.OK:
        sys.exit(exit_code)
