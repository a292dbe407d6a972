"""`convoy report`: pages and pictures of what jobs do and built."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from convoy.cli.options import ConfigOption, JsonOption, SetOption, WorkspaceOption, run_job
from convoy.core.config import parse_config
from convoy.core.errors import ConfigError

_PAGE = "page"


class _PagesByDefault(TyperGroup):
    """A group in which everything that is no command of its own is what `page` is asked for."""

    # Newer Typers bring a click of their own, so the context has no one name.
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the command in front that people leave out."""
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = [_PAGE, *args]
        return super().parse_args(ctx, args)


report_app = typer.Typer(
    cls=_PagesByDefault,
    help="A page of a run, dataset or model: `convoy report TARGET --out report.html`; or of a whole workspace:"
    " `convoy report --index WORKSPACE`.",
    no_args_is_help=True,
    subcommand_metavar="TARGET|COMMAND [ARGS]...",
)


@report_app.command(_PAGE)
def report_page(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="[TARGET]",
            help="Run id, dataset, or model; with run:, dataset: or model: in front where two have one name,"
            " or where its name is page, augmentation or ensemble, which are commands.",
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--out", "--output", "-o", help="The HTML file to write. Default: report.html or index.html."
        ),
    ] = None,
    index: Annotated[
        str | None,
        typer.Option("--index", metavar="WORKSPACE", help="Make the home page of a workspace instead."),
    ] = None,
    pages: Annotated[
        bool,
        typer.Option(
            "--pages",
            help="With --index: also write the pages that are missing beside it, at most 100 a call.",
        ),
    ] = False,
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the page of a run, dataset or model, or of a workspace: one HTML file that works offline."""
    if (target is None) == (index is None):
        raise ConfigError(
            "a page is either about one thing or the index of a workspace",
            next_step="give a run, dataset or model, or --index WORKSPACE",
        )
    if pages and index is None:
        raise ConfigError("--pages writes what an index links to", next_step="give --index WORKSPACE with it")
    if target is None:
        from convoy.pipelines.report_index import write_index  # noqa: PLC0415
        from convoy.report.index_page import draw_index  # noqa: PLC0415
        from convoy.report.page import draw_page  # noqa: PLC0415

        file = output or "index.html"
        drawer = draw_page if pages else None
        run_job(
            lambda progress: write_index(index, file, draw_index, progress=progress, draw_page=drawer),
            as_json=as_json,
        )
        return
    from convoy.pipelines.report_page import write_page  # noqa: PLC0415
    from convoy.report.page import draw_page  # noqa: PLC0415

    reference, file = target, output or "report.html"
    run_job(
        lambda progress: write_page(workspace, reference, file, draw_page, progress=progress), as_json=as_json
    )


@report_app.command("augmentation")
def report_augmentation(
    config: ConfigOption = None,
    overrides: SetOption = None,
    workspace: WorkspaceOption = None,
    output: Annotated[
        str, typer.Option("--out", "--output", "-o", help="The PNG to write.")
    ] = "augmentation.png",
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

    size = parse_config(SheetSize, {"num_images": images, "num_views": views}, where="--images, --views")
    job = read_augmented_job(config, overrides or [], workspace)
    run_job(lambda progress: draw_augmentation(job, output, size, progress=progress), as_json=as_json)


@report_app.command("ensemble")
def report_ensemble(
    ensemble: Annotated[str, typer.Argument(help="An ensemble's bundle, or the run of its search.")],
    output: Annotated[
        str, typer.Option("--out", "--output", "-o", help="The HTML file to write.")
    ] = "ensemble.html",
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the page of an ensemble: members, gain, accuracy against cost, error overlap, calibration, gate."""
    from convoy.pipelines.report_ensemble import write_ensemble_page  # noqa: PLC0415
    from convoy.report.ensemble_report import draw_ensemble_report  # noqa: PLC0415

    run_job(lambda _: write_ensemble_page(workspace, ensemble, output, draw_ensemble_report), as_json=as_json)
