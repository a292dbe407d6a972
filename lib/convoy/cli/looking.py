"""What looks, manages or measures, and does no work of its own."""

from __future__ import annotations

from typing import Annotated

import typer

from convoy.cli.options import JsonOption, SetOption, WorkspaceOption, load, run_job, words

looking_app = typer.Typer()


@looking_app.command()
def dataset(
    source: Annotated[
        str,
        typer.Argument(help="Folder, list (.csv .jsonl .parquet), tar shards, S3 Inventory; local or s3://"),
    ],
    name: Annotated[str, typer.Option("--name", "-n", help="Name of the dataset in the workspace.")],
    workspace: WorkspaceOption = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Freeze a dataset: list its samples into a manifest. Again: refresh it, and say what changed.

    On a local disk a file of the same size and modification time counts as the same.

    A list takes about 1.5 kB of memory a row, a report of S3 Inventory 0.6 kB: split larger lists, a dataset each.
    """
    from convoy.pipelines.dataset import DatasetConfig, freeze  # noqa: PLC0415

    settings = [*words(source=source, name=name), *(overrides or [])]
    config = load(DatasetConfig, None, settings, workspace)
    run_job(lambda progress: freeze(config, progress=progress), as_json=as_json)


@looking_app.command()
def verify(
    run: Annotated[str, typer.Argument(help="Run id, as printed by the job.")],
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Prove from storage alone that every input row of a run ended exactly once, and that all files are intact."""
    from convoy.pipelines.verify import verify_run  # noqa: PLC0415
    from convoy.pipelines.workspace import workspace_store  # noqa: PLC0415

    run_job(lambda _: verify_run(workspace_store(workspace), run), as_json=as_json)


@looking_app.command()
def doctor(workspace: WorkspaceOption = None, as_json: JsonOption = False) -> None:
    """Check Python, Ray, torch, devices, the workspace's rights, clock and conditional writes."""
    from convoy.pipelines.doctor import examine  # noqa: PLC0415

    run_job(lambda _: examine(workspace), as_json=as_json)


@looking_app.command()
def bench(
    job: Annotated[
        str,
        typer.Argument(
            help="What to measure: advise, cache, evaluate, layout, near_duplicates, plan, score, strategies, train."
        ),
    ],
    rows: Annotated[int | None, typer.Option("--rows", help="Short for --set rows=N.")] = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a job against its physical bounds and against the usual ways, on the same images, in one run."""
    from convoy.pipelines.bench import run_bench  # noqa: PLC0415

    settings = [*(overrides or []), *([] if rows is None else [f"rows={rows}"])]
    run_job(lambda _: run_bench(job, settings), as_json=as_json)
