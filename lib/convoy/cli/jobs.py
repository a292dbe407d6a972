"""The jobs: what does work, here or on a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from convoy.cli.options import (
    ConfigOption,
    DryRunOption,
    JsonOption,
    NewRunOption,
    RedoOption,
    ScoreDryRunOption,
    SetOption,
    WorkspaceOption,
    load,
    run_job,
    words,
)
from convoy.core.config import as_override, parse_config
from convoy.core.errors import ConfigError
from convoy.pipelines.config_files import read_job_settings
from convoy.report.progress import TerminalProgress

jobs_app = typer.Typer()


@jobs_app.command()
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

    settings = load(CacheConfig, config, overrides, workspace)
    if dry_run:
        run_job(lambda _: plan_cache(settings), as_json=as_json)
        return
    run_job(lambda progress: run_cache(settings, progress=progress, new_run=new_run), as_json=as_json)


@jobs_app.command()
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

    settings = load(TrainConfig, config, overrides, workspace)
    if dry_run:
        run_job(lambda _: plan_train(settings, new_run=new_run), as_json=as_json)
        return

    def job(progress: TerminalProgress) -> TrainReport:
        params = settings.model_dump(mode="json")
        with tracked(progress, settings.tracking, name=settings.name, params=params) as watched:
            report = run_train(settings, progress=watched, draw_curves=draw_learning_curves, new_run=new_run)
            watched.finish(final_figures(report), report.train_run)
            return report

    run_job(job, as_json=as_json)


@jobs_app.command()
def tune(
    config: ConfigOption = None,
    overrides: SetOption = None,
    workspace: WorkspaceOption = None,
    new_run: RedoOption = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Search over trainings, and build the best ensemble of them under a budget. A killed search goes on."""
    from convoy.pipelines.tune import TuneDrawers, run_tune  # noqa: PLC0415
    from convoy.pipelines.tune_config import TuneConfig  # noqa: PLC0415
    from convoy.pipelines.tune_dry_run import plan_tune  # noqa: PLC0415
    from convoy.report.curves import draw_learning_curves  # noqa: PLC0415
    from convoy.report.ensemble_report import draw_ensemble_report  # noqa: PLC0415
    from convoy.report.trial_plots import draw_parallel_coordinates, draw_trial_curves  # noqa: PLC0415

    settings = load(TuneConfig, config, overrides, workspace)
    if dry_run:
        run_job(lambda _: plan_tune(settings), as_json=as_json)
        return
    draw = TuneDrawers(
        training=draw_learning_curves,
        space=draw_parallel_coordinates,
        trials=draw_trial_curves,
        ensemble=draw_ensemble_report,
    )
    run_job(
        lambda progress: run_tune(settings, progress=progress, draw=draw, new_run=new_run), as_json=as_json
    )


@jobs_app.command()
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
    new_run: RedoOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure a bundle, an ensemble, or a pretrained network as it is, on a split: every row counted once."""
    given = words(dataset=dataset, crops=crops, mode=mode)
    options = ("dataset",)
    if compare and ensemble:
        raise ConfigError(
            "--compare takes two bundles as they are, and --ensemble averages several into one",
            where=f"--compare --ensemble {ensemble[0]}",
            next_step="leave out --compare to measure the ensemble, or give both bundles without --ensemble",
        )
    if compare:
        from convoy.pipelines.comparison import CompareConfig, compare_bundles  # noqa: PLC0415

        told = [*(overrides or []), *given, *words(workspace=workspace)]
        settings_of_both = _compared_settings(bundles or [], config, told)
        comparison = parse_config(CompareConfig, settings_of_both, where=config or "--set", options=options)
        run_job(
            lambda progress: compare_bundles(comparison, progress=progress, new_run=new_run), as_json=as_json
        )
        return
    from convoy.pipelines.evaluate import EvaluateConfig, run_evaluate  # noqa: PLC0415

    unsaid, model = _evaluated_words(bundles, ensemble)
    settings = load(
        EvaluateConfig, config, [*unsaid, *(overrides or []), *given, *model], workspace, options=options
    )
    run_job(lambda progress: run_evaluate(settings, progress=progress, new_run=new_run), as_json=as_json)


@jobs_app.command()
def score(  # noqa: PLR0917 (an option of the command line is an argument)
    bundle: Annotated[
        str | None,
        typer.Argument(
            metavar="[BUNDLE]",
            help="name@champion, name@digest or a URI; a bare name is the one written last, also if it was held.",
        ),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option("--dataset", "-d", help="Name of the dataset in the workspace.")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option("--source", help="Or what to freeze as dataset --name: folder, list, tars, inventory."),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", "-n", help="Name of the scoring, and of the dataset of --source.")
    ] = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
    workspace: WorkspaceOption = None,
    new_run: RedoOption = False,
    dry_run: ScoreDryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Score every image of a dataset exactly once, whatever fails meanwhile. --dry-run times a sample of it."""
    from convoy.pipelines.score import plan_score, run_score  # noqa: PLC0415
    from convoy.pipelines.score_config import ScoreConfig  # noqa: PLC0415

    given = words(dataset=dataset, source=source, name=name)
    replaced = _replaced_dataset_words(config, dataset, source)
    unsaid, model = _evaluated_words([bundle] if bundle else [], [])
    settings = load(ScoreConfig, config, [*replaced, *unsaid, *(overrides or []), *given, *model], workspace)
    if dry_run:
        run_job(lambda progress: plan_score(settings, progress=progress, new_run=new_run), as_json=as_json)
        return
    run_job(lambda progress: run_score(settings, progress=progress, new_run=new_run), as_json=as_json)


@jobs_app.command()
def retrain(
    config: ConfigOption = None,
    date: Annotated[
        str | None, typer.Option("--date", help="Logical date, YYYY-MM-DD. Default: today in UTC.")
    ] = None,
    overrides: SetOption = None,
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bring a model up to date, once a date: promote a better one, hold a worse one (exit code 5), or do nothing."""
    from convoy.pipelines.model_registry import registered_model  # noqa: PLC0415
    from convoy.pipelines.retrain import run_retrain  # noqa: PLC0415
    from convoy.pipelines.retrain_config import RetrainConfig, RetrainReport  # noqa: PLC0415
    from convoy.report.curves import draw_learning_curves  # noqa: PLC0415
    from convoy.report.model_mirror import follow_move  # noqa: PLC0415

    settings = load(RetrainConfig, config, [*(overrides or []), *words(date=date)], workspace)

    def job(progress: TerminalProgress) -> RetrainReport:
        report = run_retrain(settings, progress=progress, draw_curves=draw_learning_curves)
        follow_move(settings.mirror, lambda: registered_model(settings.workspace, settings.name))
        return report

    run_job(job, as_json=as_json)


@jobs_app.command()
def advise(
    config: ConfigOption = None,
    source: Annotated[
        str | None,
        typer.Argument(metavar="[SOURCE]", help="What to freeze as dataset --name. Default: the config's."),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", "-n", help="Name of the dataset of SOURCE.")] = None,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Run the advised strategy and the rejected ones at a small budget."),
    ] = False,
    overrides: SetOption = None,
    workspace: WorkspaceOption = None,
    new_run: RedoOption = False,
    as_json: JsonOption = False,
) -> None:
    """Say which way to use which backbone on a dataset, from one cached pass each; with the configs to do it."""
    from convoy.pipelines.advise import run_advise  # noqa: PLC0415
    from convoy.pipelines.advise_config import AdviseConfig  # noqa: PLC0415
    from convoy.report.advice_text import print_advice  # noqa: PLC0415
    from convoy.report.curves import draw_learning_curves  # noqa: PLC0415

    given = words(source=source, name=name) + (["dataset=null"] if source else [])
    if verify and read_job_settings(config, overrides or []).get("verify") is None:
        given += words(verify={})
    settings = load(AdviseConfig, config, [*(overrides or []), *given], workspace)
    run_job(
        lambda progress: run_advise(
            settings, progress=progress, draw_curves=draw_learning_curves, new_run=new_run
        ),
        as_json=as_json,
        print_text=lambda report: print_advice(report, workspace=settings.workspace),
    )


def _replaced_dataset_words(config: str | None, dataset: str | None, source: str | None) -> list[str]:
    """What a config says of the dataset, unsaid where the command line names another one.

    The name in a config with a source is that of its dataset; beside a dataset it is the scoring's own.
    """
    if source:
        return ["dataset=null"]
    if dataset and read_job_settings(config, []).get("source") is not None:
        return ["source=null", "name=null"]
    return []


def _compared_settings(named: Sequence[str], config: str | None, told: Sequence[str]) -> dict[str, Any]:
    """What a comparison is told: the models named take the place of the one that a config of `evaluate` names."""
    settings = read_job_settings(config, [*told, *words(bundles=list(named) or None)])
    if named:
        for which in ("bundle", "model", "ensemble"):
            settings.pop(which, None)
    return settings


def _evaluated_words(
    bundles: Sequence[str] | None, members: Sequence[str] | None
) -> tuple[list[str], list[str]]:
    """What a config says of the model, unsaid before any override, and the one to evaluate in its place.

    Members are all that is replaced of an ensemble: how they are averaged stays as it was told.
    """
    named = [*(bundles or []), *(members or [])]
    if not named:
        return [], []
    if len(named) == 1:
        return ["model=null", "ensemble=null"], words(bundle=named[0])
    if bundles:
        raise ConfigError(
            "one evaluation measures one bundle",
            where=" ".join(named),
            next_step="add --compare to compare two on the same rows, or name all by --ensemble to average them",
        )
    return ["bundle=null", "model=null"], [
        as_override("ensemble.members", [{"bundle": member} for member in named])
    ]
