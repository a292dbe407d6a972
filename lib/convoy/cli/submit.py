"""`convoy submit`: the jobs on a cluster, through Ray's Jobs API."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated

import typer

from convoy.cli.options import (
    ConfigOption,
    JsonOption,
    SetOption,
    WorkspaceOption,
    run_job,
    words,
)
from convoy.pipelines.config_files import read_job_settings
from convoy.pipelines.submit import (
    NEW_RUN,
    JobRequest,
    Verb,
    Waiting,
    address_of,
    cancel_job,
    job_logs,
    job_status,
    list_jobs,
    run_submit,
)

submit_app = typer.Typer(
    help="Run a job on a cluster, follow it, and end with its exit code. The same again changes nothing.",
    no_args_is_help=True,
)

AddressOption = Annotated[
    str | None,
    typer.Option("--address", "-a", help="The dashboard: http://HOST:8265. Default: RAY_ADDRESS."),
]
AttemptOption = Annotated[
    str | None,
    typer.Option(
        "--attempt",
        help="Makes the same job another submission: a number, or a scheduler's date."
        " Default: 1, of a retraining the day.",
    ),
]
TriesOption = Annotated[
    int,
    typer.Option(
        "--tries",
        min=1,
        help="How often this attempt may run: where the last try failed, the same command sends the next.",
    ),
]
CpusOption = Annotated[
    int | None,
    typer.Option(
        "--cpus",
        min=1,
        help="CPUs, in all, that the cluster starts first."
        " Default: CONVOY_CLUSTER_CPUS in the head's environment.",
    ),
]
GpusOption = Annotated[
    int | None,
    typer.Option(
        "--gpus",
        min=0,
        help="GPUs, in all, that the cluster starts first."
        " Default: CONVOY_CLUSTER_GPUS in the head's environment.",
    ),
]
FollowOption = Annotated[
    bool,
    typer.Option("--follow/--no-wait", help="Show the log on stderr until the job ends, or return at once."),
]
SubmittedNewRunOption = Annotated[
    bool, typer.Option("--new-run", help="Run the job with its own --new-run: see `convoy COMMAND --help`.")
]
SubmissionArgument = Annotated[
    str, typer.Argument(metavar="SUBMISSION_ID", help="As printed by the submission.")
]


def _first_attempt(verb: Verb) -> str:
    """A retraining is one of a day; any other job is the same one until it is asked for again."""
    return datetime.now(UTC).date().isoformat() if verb is Verb.RETRAIN else "1"


def _submit_command(verb: Verb) -> Callable[..., None]:
    def submit(
        *,
        config: ConfigOption = None,
        overrides: SetOption = None,
        workspace: WorkspaceOption = None,
        address: AddressOption = None,
        attempt: AttemptOption = None,
        tries: TriesOption = 1,
        cpus: CpusOption = None,
        gpus: GpusOption = None,
        follow: FollowOption = True,
        new_run: SubmittedNewRunOption = False,
        as_json: JsonOption = False,
    ) -> None:
        if new_run and verb is Verb.RETRAIN:
            raise typer.BadParameter(
                "a retraining goes on by its date, and has no runs to leave", param_hint="--new-run"
            )
        request = JobRequest(
            verb=verb,
            settings=read_job_settings(config, [*(overrides or []), *words(workspace=workspace)]),
            arguments=(NEW_RUN,) if new_run else (),
            attempt=attempt or _first_attempt(verb),
            tries=tries,
            cpus=cpus,
            gpus=gpus,
        )
        waiting = Waiting.FOLLOW if follow else Waiting.NOT
        where = address_of(address, os.environ)
        run_job(lambda _: run_submit(where, request, waiting=waiting, write_log=_write), as_json=as_json)

    submit.__doc__ = f"Submit `convoy {verb.value}` with these settings."
    return submit


for _verb in Verb:
    submit_app.command(_verb.value)(_submit_command(_verb))


@submit_app.command("status")
def submit_status(
    submission_id: SubmissionArgument, address: AddressOption = None, as_json: JsonOption = False
) -> None:
    """Say how a submitted job stands, and how it ended."""
    run_job(lambda _: job_status(address_of(address, os.environ), submission_id), as_json=as_json)


@submit_app.command("logs")
def submit_logs(
    submission_id: SubmissionArgument,
    address: AddressOption = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the job ends, on stderr.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what a job has printed."""
    waiting = Waiting.FOLLOW if follow else Waiting.NOT
    where = address_of(address, os.environ)
    if as_json:
        run_job(lambda _: job_logs(where, submission_id, waiting=waiting, write_log=_write), as_json=True)
        return
    report = job_logs(where, submission_id, waiting=waiting, write_log=_write)
    if not follow:
        print(report.logs, end="")


@submit_app.command("cancel")
def submit_cancel(
    submission_id: SubmissionArgument, address: AddressOption = None, as_json: JsonOption = False
) -> None:
    """Stop a job. Its run stays, and can go on under another --attempt."""
    run_job(lambda _: cancel_job(address_of(address, os.environ), submission_id), as_json=as_json)


@submit_app.command("list")
def submit_list(address: AddressOption = None, as_json: JsonOption = False) -> None:
    """List all submissions that the cluster remembers, the newest first."""
    run_job(lambda _: list_jobs(address_of(address, os.environ)), as_json=as_json)


def _write(text: str) -> None:
    print(text, end="", file=sys.stderr, flush=True)
