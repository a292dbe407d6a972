"""`convoy`: the door for people. stdout is the result, stderr is progress."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Annotated, TypeVar

import typer
from pydantic import BaseModel

from convoy.core.config import load_config
from convoy.core.errors import ConfigError, ConvoyError, ErrorBudgetExceeded, ExitCode
from convoy.report.progress import TerminalProgress
from convoy.report.tables import print_report

app = typer.Typer(
    name="convoy",
    help="Use ConvNets on images in object storage in every way that pays.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
models_app = typer.Typer(help="Look after networks and bundles in the workspace.", no_args_is_help=True)
app.add_typer(models_app, name="models")
report_app = typer.Typer(help="Look at what jobs do to images, and at what they built.", no_args_is_help=True)
app.add_typer(report_app, name="report")

ConfigOption = Annotated[str | None, typer.Option("--config", "-c", help="YAML file of the job.")]
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
    bool, typer.Option("--new-run", help="Leave an unfinished run of the same target and start afresh.")
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]

ReportT = TypeVar("ReportT", bound=BaseModel)
ConfigT = TypeVar("ConfigT", bound=BaseModel)


@app.command()
def dataset(
    source: Annotated[
        str, typer.Argument(help="Folder, list (.csv .jsonl .parquet), tar shards; local or s3://")
    ],
    name: Annotated[str, typer.Option("--name", "-n", help="Name of the dataset in the workspace.")],
    workspace: WorkspaceOption = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Freeze a dataset: list its samples into a manifest. Again: refresh it, and say what changed."""
    from convoy.pipelines.dataset import DatasetConfig, freeze  # noqa: PLC0415

    settings = [f"source={json.dumps(source)}", f"name={json.dumps(name)}", *(overrides or [])]
    config = _load(DatasetConfig, None, settings, workspace)
    _run(lambda progress: freeze(config, progress=progress), as_json=as_json)


@app.command()
def cache(
    config: ConfigOption = None,
    overrides: SetOption = None,
    workspace: WorkspaceOption = None,
    new_run: NewRunOption = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compute features of a dataset and keep them: only what the workspace does not have yet."""
    from convoy.pipelines.cache import CacheConfig, plan_cache, run_cache  # noqa: PLC0415

    settings = _load(CacheConfig, config, overrides, workspace)
    if dry_run:
        _run(lambda _: plan_cache(settings), as_json=as_json)
        return
    _run(lambda progress: run_cache(settings, progress=progress, new_run=new_run), as_json=as_json)


@app.command()
def train(
    config: ConfigOption = None,
    overrides: SetOption = None,
    workspace: WorkspaceOption = None,
    new_run: NewRunOption = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Use a network by a strategy: as it is, under a new head, fine-tuned, or from scratch. Writes a bundle."""
    from convoy.pipelines.train import TrainReport, run_train  # noqa: PLC0415
    from convoy.pipelines.train_config import TrainConfig  # noqa: PLC0415
    from convoy.pipelines.train_plan import plan_train  # noqa: PLC0415
    from convoy.report.curves import draw_learning_curves  # noqa: PLC0415
    from convoy.report.trackers import final_figures, tracked  # noqa: PLC0415

    settings = _load(TrainConfig, config, overrides, workspace)
    if dry_run:
        _run(lambda _: plan_train(settings), as_json=as_json)
        return

    def job(progress: TerminalProgress) -> TrainReport:
        params = settings.model_dump(mode="json")
        with tracked(progress, settings.tracking, name=settings.name, params=params) as watched:
            report = run_train(settings, progress=watched, draw_curves=draw_learning_curves, new_run=new_run)
            watched.finish(final_figures(report))
            return report

    _run(job, as_json=as_json)


@app.command()
def tune(
    config: ConfigOption = None,
    overrides: SetOption = None,
    workspace: WorkspaceOption = None,
    new_run: NewRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Search over trainings, and build the best ensemble of them under a budget. A killed search goes on."""
    from convoy.pipelines.tune import TuneDrawers, run_tune  # noqa: PLC0415
    from convoy.pipelines.tune_config import TuneConfig  # noqa: PLC0415
    from convoy.report.curves import draw_learning_curves  # noqa: PLC0415
    from convoy.report.ensemble_report import draw_ensemble_report  # noqa: PLC0415
    from convoy.report.trial_plots import draw_parallel_coordinates, draw_trial_curves  # noqa: PLC0415

    settings = _load(TuneConfig, config, overrides, workspace)
    draw = TuneDrawers(
        training=draw_learning_curves,
        space=draw_parallel_coordinates,
        trials=draw_trial_curves,
        ensemble=draw_ensemble_report,
    )
    _run(lambda progress: run_tune(settings, progress=progress, draw=draw, new_run=new_run), as_json=as_json)


@app.command()
def evaluate(  # noqa: PLR0917 (an option of the command line is an argument)
    bundles: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[BUNDLE]...", help="A bundle: name, name@digest or its URI. Two with --compare."
        ),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option("--dataset", "-d", help="Name of the dataset in the workspace.")
    ] = None,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Compare two bundles on the same rows: paired interval and test."),
    ] = False,
    ensemble: Annotated[
        list[str] | None,
        typer.Option("--ensemble", help="A bundle to average with equal weights. Repeatable."),
    ] = None,
    crops: Annotated[
        str | None,
        typer.Option("--crops", help="center, flip, five, ten, multiscale. Default: an ensemble's own."),
    ] = None,
    mode: Annotated[
        str | None, typer.Option("--mode", help="exact, gated or dense; the last two beside the exact one.")
    ] = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
    workspace: WorkspaceOption = None,
    new_run: NewRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure a bundle, an ensemble, or a pretrained network as it is, on a split: every row counted once."""
    words = _words(dataset=dataset, crops=crops, mode=mode)
    if compare:
        from convoy.pipelines.comparison import CompareConfig, compare_bundles  # noqa: PLC0415

        words += _words(bundles=[*(bundles or []), *(ensemble or [])] or None)
        comparison = _load(CompareConfig, config, [*(overrides or []), *words], workspace)
        _run(
            lambda progress: compare_bundles(comparison, progress=progress, new_run=new_run), as_json=as_json
        )
        return
    from convoy.pipelines.evaluate import EvaluateConfig, run_evaluate  # noqa: PLC0415

    words += _evaluated_words(bundles, ensemble)
    settings = _load(EvaluateConfig, config, [*(overrides or []), *words], workspace)
    _run(lambda progress: run_evaluate(settings, progress=progress, new_run=new_run), as_json=as_json)


@app.command()
def verify(
    run: Annotated[str, typer.Argument(help="Run id, as printed by the job.")],
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Prove from storage alone that every input row of a run ended exactly once, and that all files are intact."""
    from convoy.pipelines.verify import verify_run  # noqa: PLC0415
    from convoy.pipelines.workspace import workspace_uri  # noqa: PLC0415
    from convoy.storage.stores import open_store  # noqa: PLC0415

    _run(lambda _: verify_run(open_store(workspace_uri(workspace)), run), as_json=as_json)


@app.command()
def doctor(workspace: WorkspaceOption = None, as_json: JsonOption = False) -> None:
    """Check Python, Ray, torch, devices, the workspace's rights, clock and conditional writes."""
    from convoy.pipelines.doctor import examine  # noqa: PLC0415
    from convoy.pipelines.workspace import workspace_uri  # noqa: PLC0415

    _run(lambda _: examine(workspace_uri(workspace)), as_json=as_json)


@app.command()
def bench(
    job: Annotated[str, typer.Argument(help="What to measure: cache, layout, plan, strategies, train.")],
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a job against its physical bounds and against the usual ways, on the same images, in one run."""
    from convoy.pipelines.bench import run_bench  # noqa: PLC0415

    _run(lambda _: run_bench(job, overrides or []), as_json=as_json)


@models_app.command("list")
def models_list(workspace: WorkspaceOption = None, as_json: JsonOption = False) -> None:
    """List the bundles of the workspace: what they are made of, and what they are worth."""
    from convoy.pipelines.model_listing import list_models  # noqa: PLC0415

    _run(lambda _: list_models(workspace), as_json=as_json)


@models_app.command("show")
def models_show(
    bundle: Annotated[str, typer.Argument(help="A bundle: name, name@digest or its URI.")],
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a bundle is; of an ensemble, its members, their weights, crops and gate."""
    from convoy.pipelines.model_listing import show_model  # noqa: PLC0415

    _run(lambda _: show_model(workspace, bundle), as_json=as_json)


@models_app.command("fetch")
def models_fetch(
    arch: Annotated[
        str, typer.Argument(help="torchvision:<name>, timm:<name>, a built-in, or module:factory.")
    ],
    weights: Annotated[str, typer.Option(help="Weight name, URI of a state dict, or 'random'.")] = "DEFAULT",
    workspace: WorkspaceOption = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bring a weight set into the workspace once; workers only read the workspace."""
    from convoy.pipelines.models import fetch_backbone  # noqa: PLC0415
    from convoy.pipelines.workspace import workspace_uri  # noqa: PLC0415
    from convoy.storage.stores import open_store  # noqa: PLC0415
    from convoy.vision.backbone_config import BackboneConfig  # noqa: PLC0415

    settings = [f"arch={json.dumps(arch)}", f"weights={json.dumps(weights)}", *(overrides or [])]
    config = load_config(BackboneConfig, None, settings)
    _run(lambda _: fetch_backbone(open_store(workspace_uri(workspace)), config), as_json=as_json)


@models_app.command("export")
def models_export(
    bundle: Annotated[str, typer.Argument(help="A bundle: name, name@digest or its URI.")],
    to: Annotated[str, typer.Option("--to", help="onnx, or torch (a .pt2 file of torch.export).")],
    output: Annotated[str, typer.Option("--output", "-o", help="The file to write: a path or s3:// URI.")],
    dataset: Annotated[
        str | None,
        typer.Option("--dataset", "-d", help="Check on held-out images of it, not on random ones."),
    ] = None,
    images: Annotated[
        int | None, typer.Option("--images", help="How many images the file is checked on.")
    ] = None,
    workspace: WorkspaceOption = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a bundle as one graph, uint8 images to float32 logits, and prove that the file computes the same."""
    from convoy.pipelines.export import ExportConfig, run_export  # noqa: PLC0415

    words = _words(bundle=bundle, to=to, output=output, dataset=dataset, images=images)
    config = _load(ExportConfig, None, [*(overrides or []), *words], workspace)
    _run(lambda progress: run_export(config, progress=progress), as_json=as_json)


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
    _run(lambda progress: draw_augmentation(job, output, size, progress=progress), as_json=as_json)


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

    _run(lambda _: write_ensemble_page(workspace, ensemble, output, draw_ensemble_report), as_json=as_json)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command line; exits with a code of `ExitCode`."""
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


def _load(
    model: type[ConfigT], path: str | None, overrides: Sequence[str] | None, workspace: str | None
) -> ConfigT:
    settings = list(overrides or [])
    if workspace is not None:
        settings.append(f"workspace={json.dumps(workspace)}")
    return load_config(model, path, settings)


def _words(**values: object) -> list[str]:
    """What was said on the command line, as overrides that come last and so win."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items() if value is not None]


def _evaluated_words(bundles: Sequence[str] | None, members: Sequence[str] | None) -> list[str]:
    """The one model to evaluate, which takes the place of the one that a config names."""
    named = [*(bundles or []), *(members or [])]
    if len(named) > 1 and not bundles:
        ensemble = {"members": [{"bundle": member} for member in named]}
        return [*_words(ensemble=ensemble), "bundle=null", "model=null"]
    if len(named) > 1:
        raise ConfigError(
            "one evaluation measures one bundle",
            where=" ".join(named),
            next_step="add --compare to compare two on the same rows, or name all by --ensemble to average them",
        )
    return [*_words(bundle=named[0]), "model=null", "ensemble=null"] if named else []


def _run(job: Callable[[TerminalProgress], ReportT], *, as_json: bool) -> None:
    """Run a job, print its report, and turn a broken promise of the report into the exit code."""
    with TerminalProgress() as progress:
        report = job(progress)
    if as_json:
        print(json.dumps(report.model_dump(mode="json")), flush=True)
    else:
        print_report(report)
    if not getattr(report, "within_error_budget", True):
        raise ErrorBudgetExceeded(
            "more samples were rejected than the error budget allows; the results are kept",
            next_step="look at the rejects of the run, then mend the data or raise error_budget",
        )
    if not getattr(report, "ok", True):
        sys.exit(ExitCode.ERROR)


if __name__ == "__main__":
    main()
