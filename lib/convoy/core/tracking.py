"""Where else the figures of a training and the aliases of a model go, beside the workspace."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator

from convoy.core.config import StrictModel


def _without_credentials(uri: str | None) -> str | None:
    if uri is not None and "@" in urlsplit(uri).netloc:
        raise ValueError("credentials do not belong in the URI: set MLFLOW_TRACKING_USERNAME and _PASSWORD")
    return uri


# The URI of an MLflow server, or of a store of its own such as file:// or sqlite://; null is off.
MlflowUri = Annotated[str | None, AfterValidator(_without_credentials)]


class TrackingConfig(StrictModel):
    """An MLflow server (its tracking URI) and experiment, a folder for TensorBoard; null is off.

    A run that goes on is the MLflow run with its id as tag `convoy.run_id`, and goes on in the TensorBoard folder
    `<name>/<run id>`. Both need the extra `tracking`. A tracker that fails is left out and never fails a training. A
    server's credentials come from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, and are refused in the URI.
    """

    mlflow_uri: MlflowUri = None
    mlflow_experiment: str = "convoy"
    tensorboard: str | None = None


class MirrorConfig(StrictModel):
    """MLflow's model registry, which gets the aliases of a model after each move; null is off.

    Needs the extra `tracking`. A mirror that fails is reported and fails nothing; the next move heals it.
    """

    mlflow_uri: MlflowUri = None
