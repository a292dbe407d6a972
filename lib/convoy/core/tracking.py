"""Where else the curves and figures of a training go, beside its run folder."""

from __future__ import annotations

from urllib.parse import urlsplit

from pydantic import field_validator

from convoy.core.config import StrictModel


class TrackingConfig(StrictModel):
    """An MLflow server (its tracking URI) and experiment, a folder for TensorBoard; null is off.

    Both need the extra `tracking`. A tracker that fails is left out and never fails a training. A server's
    credentials come from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, and are refused in the URI.
    """

    mlflow_uri: str | None = None
    mlflow_experiment: str = "convoy"
    tensorboard: str | None = None

    @field_validator("mlflow_uri")
    @classmethod
    def _uri_keeps_no_secret(cls, uri: str | None) -> str | None:
        if uri is not None and "@" in urlsplit(uri).netloc:
            raise ValueError(
                "credentials do not belong in the URI: set MLFLOW_TRACKING_USERNAME and _PASSWORD"
            )
        return uri
