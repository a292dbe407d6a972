"""`convoy report`: pictures and pages of what jobs do and built."""

from __future__ import annotations

from typing import Annotated

import typer

from convoy.cli.options import ConfigOption, JsonOption, SetOption, WorkspaceOption, run_job
from convoy.core.config import load_config

report_app = typer.Typer(help="Look at what jobs do to images, and at what they built.", no_args_is_help=True)


@report_app.command("augmentation")
def report_augmentation(
    config: ConfigOption = None,
    overrides: SetOption = None,
    workspace: WorkspaceOption = None,
    output: Annotated[str, typer.Option("--output", "-o", help="The PNG to write.")] = "augmentation.png",
    images: Annotated[int, typer.Option("--images", help="Rows, stratified over the classes.")] = 8,
    views: Annotated[int, typer.Option("--views", help="Draws of the policy beside the eval view.")] = 7,
    as_json: JsonOption = False,
) -> None:
    """Draw images of the train split as the `augmentation` of a train or cache config shows them."""
    from convoy.pipelines.report_augmentation import (  # noqa: PLC0415
        SheetSize,
        draw_augmentation,
        read_augmented_job,
    )

    size = load_config(SheetSize, None, [f"num_images={images}", f"num_views={views}"])
    job = read_augmented_job(config, overrides or [], workspace)
    run_job(lambda progress: draw_augmentation(job, output, size, progress=progress), as_json=as_json)


@report_app.command("ensemble")
def report_ensemble(
    ensemble: Annotated[str, typer.Argument(help="An ensemble's bundle, or the run of its search.")],
    output: Annotated[str, typer.Option("--output", "-o", help="The HTML file to write.")] = "ensemble.html",
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the page of an ensemble: members, gain, accuracy against cost, error overlap, calibration, gate."""
    from convoy.pipelines.report_ensemble import write_ensemble_page  # noqa: PLC0415
    from convoy.report.ensemble_report import draw_ensemble_report  # noqa: PLC0415

    run_job(lambda _: write_ensemble_page(workspace, ensemble, output, draw_ensemble_report), as_json=as_json)
