"""`convoy models`: networks and bundles of the workspace."""

from __future__ import annotations

from typing import Annotated

import typer

from convoy.cli.options import JsonOption, SetOption, WorkspaceOption, load, run_job, words
from convoy.core.config import load_config
from convoy.core.tracking import MirrorConfig
from convoy.storage.object_store import WriterMode

WritersOption = Annotated[
    WriterMode, typer.Option("--writers", help="single: where the store has no conditional writes.")
]

MlflowOption = Annotated[
    str | None,
    typer.Option("--mlflow-uri", help="Tracking URI of an MLflow whose model registry gets the aliases too."),
]

models_app = typer.Typer(help="Look after networks and bundles in the workspace.", no_args_is_help=True)


@models_app.command("list")
def models_list(workspace: WorkspaceOption = None, as_json: JsonOption = False) -> None:
    """List the bundles of the workspace: what they are made of, and what they are worth."""
    from convoy.pipelines.model_listing import list_models  # noqa: PLC0415
    from convoy.pipelines.workspace import workspace_store  # noqa: PLC0415

    where = workspace_store(workspace).root_uri
    run_job(lambda _: list_models(workspace), as_json=as_json, if_empty=f"models of {where}: none")


@models_app.command("show")
def models_show(
    bundle: Annotated[str, typer.Argument(help="A bundle: name, name@digest or its URI.")],
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a bundle is; of an ensemble, its members, their weights, crops and gate."""
    from convoy.pipelines.model_listing import show_model  # noqa: PLC0415

    run_job(lambda _: show_model(workspace, bundle), as_json=as_json)


@models_app.command("promote")
def models_promote(
    name: Annotated[str, typer.Argument(help="Name of the model.")],
    reason: Annotated[str, typer.Option("--reason", help="Why; it is kept in the history.")],
    digest: Annotated[
        str | None, typer.Option("--digest", help="The version to promote. Default: the candidate.")
    ] = None,
    writers: WritersOption = WriterMode.MANY,
    mlflow_uri: MlflowOption = None,
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a version the champion; the champion so far becomes the previous one."""
    from convoy.pipelines.model_registry import promote_model  # noqa: PLC0415

    mirror = _mirror(mlflow_uri)
    run_job(
        lambda _: promote_model(workspace, name, digest=digest, reason=reason, writers=writers),
        as_json=as_json,
    )
    _follow_move(mirror, workspace, name)


@models_app.command("rollback")
def models_rollback(
    name: Annotated[str, typer.Argument(help="Name of the model.")],
    reason: Annotated[
        str, typer.Option("--reason", help="Why; it is kept in the history.")
    ] = "rolled back by hand",
    writers: WritersOption = WriterMode.MANY,
    mlflow_uri: MlflowOption = None,
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make the previous version the champion again; the two change places."""
    from convoy.pipelines.model_registry import rollback_model  # noqa: PLC0415

    mirror = _mirror(mlflow_uri)
    run_job(lambda _: rollback_model(workspace, name, reason=reason, writers=writers), as_json=as_json)
    _follow_move(mirror, workspace, name)


@models_app.command("mirror")
def models_mirror(
    name: Annotated[str, typer.Argument(help="Name of the model.")],
    mlflow_uri: Annotated[str, typer.Option("--mlflow-uri", help="MLflow's tracking URI: http://HOST:5000.")],
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Set the aliases in MLflow's model registry to those of the workspace, which decides."""
    from convoy.pipelines.model_registry import registered_model  # noqa: PLC0415
    from convoy.report.model_mirror import mirror_aliases  # noqa: PLC0415

    mirror = _mirror(mlflow_uri)
    run_job(lambda _: mirror_aliases(registered_model(workspace, name), mirror), as_json=as_json)


@models_app.command("diff")
def models_diff(
    first: Annotated[str, typer.Argument(help="A bundle: name, name@digest, name@champion or its URI.")],
    second: Annotated[str, typer.Argument(help="Another one.")],
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say in what two bundles differ: config, classes, preparation of images, metrics."""
    from convoy.pipelines.model_registry import diff_models  # noqa: PLC0415

    run_job(lambda _: diff_models(workspace, first, second), as_json=as_json)


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
    from convoy.pipelines.workspace import workspace_store  # noqa: PLC0415
    from convoy.vision.backbone_config import BackboneConfig  # noqa: PLC0415

    settings = [*words(arch=arch, weights=weights), *(overrides or [])]
    config = load_config(BackboneConfig, None, settings)
    run_job(lambda _: fetch_backbone(workspace_store(workspace), config), as_json=as_json)


@models_app.command("export")
def models_export(
    bundle: Annotated[str, typer.Argument(help="A bundle: name, name@digest or its URI.")],
    to: Annotated[str, typer.Option("--to", help="onnx, or torch (a .pt2 file of torch.export).")],
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="The file to write: a path or s3:// URI. Default: NAME.onnx or NAME.pt2 here.",
        ),
    ] = None,
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

    given = words(bundle=bundle, to=to, output=output, dataset=dataset, images=images)
    config = load(ExportConfig, None, [*(overrides or []), *given], workspace)
    run_job(lambda progress: run_export(config, progress=progress), as_json=as_json)


def _mirror(mlflow_uri: str | None) -> MirrorConfig:
    return load_config(MirrorConfig, None, words(mlflow_uri=mlflow_uri))


def _follow_move(mirror: MirrorConfig, workspace: str | None, name: str) -> None:
    from convoy.pipelines.model_registry import registered_model  # noqa: PLC0415
    from convoy.report.model_mirror import follow_move  # noqa: PLC0415

    follow_move(mirror, lambda: registered_model(workspace, name))
