"""`convoy inspect`: pictures of what a model looks for and looks at."""

from __future__ import annotations

from typing import Annotated

import typer

from convoy.cli.options import (
    ConfigOption,
    JsonOption,
    RedoOption,
    SetOption,
    WorkspaceOption,
    load,
    run_job,
    words,
)

inspect_app = typer.Typer()


@inspect_app.command("inspect")
def inspect_model(
    bundle: Annotated[
        str | None, typer.Argument(metavar="[BUNDLE]", help="A bundle: name, name@digest or its URI.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option("--dataset", "-d", help="Name of the dataset in the workspace.")
    ] = None,
    split: Annotated[
        list[str] | None, typer.Option("--split", help="train, val or test. Repeatable. Default: test.")
    ] = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
    workspace: WorkspaceOption = None,
    new_run: RedoOption = False,
    as_json: JsonOption = False,
) -> None:
    """Look into a model over a sample: filters, what classes and channels like, Grad-CAM, maps, near duplicates."""
    from convoy.pipelines.inspect import run_inspect  # noqa: PLC0415
    from convoy.pipelines.inspect_config import InspectConfig  # noqa: PLC0415
    from convoy.report.embedding_plot import draw_embedding_map  # noqa: PLC0415

    given = words(dataset=dataset, splits=split or None, bundle=bundle)
    if bundle is not None:
        given.append("model=null")
    settings = load(InspectConfig, config, [*(overrides or []), *given], workspace, options=("dataset",))
    run_job(
        lambda progress: run_inspect(
            settings, progress=progress, draw_map=draw_embedding_map, new_run=new_run
        ),
        as_json=as_json,
    )
