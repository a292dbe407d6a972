"""The aliases of a model, mirrored to MLflow's model registry, for those who look there.

The workspace decides. The mirror is set to what stands in it, so that setting it again heals whatever was missed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from convoy.core.config import StrictModel
from convoy.core.errors import ConfigError, ConvoyError, StorageError
from convoy.core.tracking import MirrorConfig
from convoy.pipelines.model_registry import RegisteredModel
from convoy.report.trackers import missing_package, mlflow_patience, report_failure

# Whose the model is, and which of its versions; and the move of aliases that MLflow has seen last.
_WORKSPACE, _DIGEST, _REVISION = "convoy.workspace", "convoy.digest", "convoy.revision"


class MirrorReport(StrictModel):
    """What MLflow has now: `versions` are its own numbers, by alias; `moved` are the aliases that changed."""

    model: str
    mlflow_uri: str
    revision: int
    versions: dict[str, str]
    moved: list[str]


def mirror_aliases(model: RegisteredModel, config: MirrorConfig) -> MirrorReport:
    """Set the aliases of MLflow's model of that name to those of the workspace, with a version for each bundle.

    Versions are made where they are missing, and none is removed. An MLflow that has seen a later move keeps it. Raises
    ConfigError without the package, without a URI, or where the name is taken by a model that is not this one, and
    StorageError where MLflow refuses or cannot be reached.
    """
    with _mlflow(config) as client:
        seen = _own_model(client, model)
        held = {alias: str(version) for alias, version in seen.aliases.items() if alias in model.aliases}
        if int(seen.tags.get(_REVISION, 0)) > model.revision:
            return _report(model, config, held, held, int(seen.tags[_REVISION]))
        wanted = {
            alias: _version(client, model, digest)
            for alias, digest in model.aliases.items()
            if digest is not None
        }
        for alias in held.keys() - wanted.keys():
            client.delete_registered_model_alias(model.name, alias)
        for alias, version in wanted.items():
            if held.get(alias) != version:
                client.set_registered_model_alias(model.name, alias, version)
        client.set_registered_model_tag(model.name, _REVISION, str(model.revision))
    return _report(model, config, held, wanted, model.revision)


def follow_move(config: MirrorConfig, read_model: Callable[[], RegisteredModel]) -> None:
    """Mirror a move that was made, where the config names a mirror; one that fails is reported on stderr.

    The move is made already, and the next one mirrors this one too.
    """
    if config.mlflow_uri is None:
        return
    try:
        mirror_aliases(read_model(), config)
    except ConvoyError as error:
        report_failure("the mirror in MLflow", error)


@contextmanager
def _mlflow(config: MirrorConfig) -> Iterator[Any]:
    try:
        from mlflow.exceptions import MlflowException  # noqa: PLC0415
        from mlflow.tracking import MlflowClient  # noqa: PLC0415
    except ImportError:
        raise missing_package("mlflow") from None
    if config.mlflow_uri is None:
        raise ConfigError(
            "there is no model registry to mirror to",
            where="mlflow_uri",
            next_step="name MLflow's tracking URI, such as http://mlflow:5000",
        )
    try:
        with mlflow_patience():
            yield MlflowClient(tracking_uri=config.mlflow_uri, registry_uri=config.mlflow_uri)
    except MlflowException as error:
        raise StorageError(
            f"MLflow says: {(str(error).splitlines() or [''])[0]}",
            where=config.mlflow_uri,
            next_step="mirror again with `convoy models mirror`; the workspace has the aliases as they are",
        ) from error


def _own_model(client: Any, model: RegisteredModel) -> Any:
    """MLflow's model of the name, made where there is none."""
    found = client.search_registered_models(filter_string=f"name = '{model.name}'")
    if not found:
        return client.create_registered_model(model.name, tags={_WORKSPACE: model.workspace})
    theirs = found[0].tags.get(_WORKSPACE)
    if theirs != model.workspace:
        raise ConfigError(
            f"MLflow's model '{model.name}' "
            + (f"mirrors the workspace {theirs}" if theirs else "was not made by Convoy"),
            where=model.workspace,
            next_step="rename one of the two: a name has one owner",
        )
    return found[0]


def _version(client: Any, model: RegisteredModel, digest: str) -> str:
    """The number of MLflow's version of a bundle, made where there is none; of two that raced, the first."""
    found = client.search_model_versions(f"name = '{model.name}' and tags.`{_DIGEST}` = '{digest}'")
    if found:
        return str(min(int(one.version) for one in found))
    made = client.create_model_version(
        model.name,
        source=model.bundles[digest],
        tags={_WORKSPACE: model.workspace, _DIGEST: digest},
        description=f"The bundle {model.name}@{digest} of {model.workspace}",
    )
    return str(made.version)


def _report(
    model: RegisteredModel, config: MirrorConfig, before: dict[str, str], now: dict[str, str], revision: int
) -> MirrorReport:
    return MirrorReport(
        model=model.name,
        mlflow_uri=config.mlflow_uri or "",
        revision=revision,
        versions=now,
        moved=sorted(alias for alias in before.keys() | now.keys() if before.get(alias) != now.get(alias)),
    )
