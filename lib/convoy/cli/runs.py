"""`convoy runs`: what runs of the workspace do and did, and how to tidy up after them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from convoy.cli.options import JsonOption, WorkspaceOption, run_job

if TYPE_CHECKING:
    from convoy.storage.object_store import ObjectStore

runs_app = typer.Typer(help="See what runs of the workspace do and did, and tidy up.", no_args_is_help=True)

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Run id, as printed by the job.")]
ApplyOption = Annotated[bool, typer.Option("--apply", help="Make the changes; without, they are only shown.")]


@runs_app.command("list")
def runs_list(workspace: WorkspaceOption = None, as_json: JsonOption = False) -> None:
    """List all runs: finished, held by a driver, open, given up or left behind, and how far they are."""
    from convoy.pipelines.runs_list import list_runs  # noqa: PLC0415

    store = _store(workspace)
    run_job(lambda _: list_runs(store), as_json=as_json, if_empty=f"runs of {store.root_uri}: none")


@runs_app.command("show")
def runs_show(run: RunArgument, workspace: WorkspaceOption = None, as_json: JsonOption = False) -> None:
    """Say what a run is and how far it is, from storage alone: who watches need not be where it runs."""
    from convoy.pipelines.runs_show import show_run  # noqa: PLC0415

    run_job(lambda _: show_run(_store(workspace), run), as_json=as_json)


@runs_app.command("diff")
def runs_diff(
    run_a: Annotated[str, typer.Argument(metavar="RUN_A", help="Run id.")],
    run_b: Annotated[str, typer.Argument(metavar="RUN_B", help="Run id.")],
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say in what two runs differ, and how many of their predictions do."""
    from convoy.pipelines.runs_diff import diff_runs  # noqa: PLC0415

    run_job(lambda _: diff_runs(_store(workspace), run_a, run_b), as_json=as_json)


@runs_app.command("cancel")
def runs_cancel(run: RunArgument, workspace: WorkspaceOption = None, as_json: JsonOption = False) -> None:
    """Give an unfinished run up: its driver stops at its next slice, and the same command starts a new run."""
    from convoy.pipelines.runs_cancel import cancel_run  # noqa: PLC0415

    run_job(lambda _: cancel_run(_store(workspace), run), as_json=as_json)


@runs_app.command("repair")
def runs_repair(
    run: RunArgument,
    apply: ApplyOption = False,
    retry_unfetched: Annotated[
        bool,
        typer.Option(
            "--retry-unfetched",
            help="Compute slices again of which the store did not give all images, as after a mended permission.",
        ),
    ] = False,
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find files that are damaged or belong to nothing; --apply removes them, and the job's command makes them anew."""
    from convoy.pipelines.runs_repair import repair_run  # noqa: PLC0415
    from convoy.pipelines.runs_state import Changes  # noqa: PLC0415

    changes = Changes.MADE if apply else Changes.SHOWN
    run_job(
        lambda _: repair_run(_store(workspace), run, changes, retry_unfetched=retry_unfetched),
        as_json=as_json,
    )


@runs_app.command("gc")
def runs_gc(
    apply: ApplyOption = False,
    older_than_days: Annotated[
        float | None,
        typer.Option(
            "--older-than",
            min=0,
            # A hundred years: of many more there is no date.
            max=36_500,
            metavar="DAYS",
            help="Of runs that were left behind. Default: 7.",
        ),
    ] = None,
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find the files of runs that were given up or left behind, of killed probes and writes; --apply removes them."""
    from convoy.pipelines.runs_gc import OLDER_THAN_DAYS, collect_garbage  # noqa: PLC0415
    from convoy.pipelines.runs_state import Changes  # noqa: PLC0415

    changes = Changes.MADE if apply else Changes.SHOWN
    days = OLDER_THAN_DAYS if older_than_days is None else older_than_days
    run_job(lambda _: collect_garbage(_store(workspace), changes, older_than_days=days), as_json=as_json)


def _store(workspace: str | None) -> ObjectStore:
    from convoy.pipelines.workspace import workspace_store  # noqa: PLC0415

    return workspace_store(workspace)
