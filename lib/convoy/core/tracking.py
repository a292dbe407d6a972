"""Where else the curves and figures of a training go, beside its run folder."""

from __future__ import annotations

from convoy.core.config import StrictModel


class TrackingConfig(StrictModel):
    """An MLflow server (its tracking URI) and experiment, a folder for TensorBoard; null is off.

    Both need the extra `tracking`. A tracker that fails is left out and never fails a training.
    """

    mlflow_uri: str | None = None
    mlflow_experiment: str = "convoy"
    tensorboard: str | None = None
