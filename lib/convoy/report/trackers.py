"""Trackers: the same curves and figures to MLflow or TensorBoard. One that fails is left out."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from convoy.core.errors import ConfigError
from convoy.core.progress import Progress
from convoy.core.tracking import TrackingConfig
from convoy.core.training_events import EpochResult, TrainingEvent

_CURVES = ("train_loss", "train_top1", "val_nll", "val_top1", "learning_rate", "images_per_s")
# MLflow's client waits for minutes by itself; a training must not.
_MLFLOW_PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
_MAX_PARAM_CHARACTERS = 500


class Tracker(Protocol):
    """Somewhere else where a training is kept."""

    def epoch(self, result: EpochResult) -> None:
        """Keep the figures of one epoch."""
        ...

    def close(self) -> None:
        """The training has ended."""
        ...


class MlflowTracker:
    """One MLflow run of an experiment, with the resolved config as its parameters."""

    def __init__(self, config: TrackingConfig, *, name: str, params: Mapping[str, Any]) -> None:
        for variable, value in _MLFLOW_PATIENCE.items():
            os.environ.setdefault(variable, value)
        try:
            from mlflow.tracking import MlflowClient  # noqa: PLC0415
        except ImportError:
            raise _missing("mlflow") from None
        self._client = MlflowClient(tracking_uri=config.mlflow_uri)
        experiment = self._client.get_experiment_by_name(config.mlflow_experiment)
        experiment_id = (
            experiment.experiment_id
            if experiment is not None
            else self._client.create_experiment(config.mlflow_experiment)
        )
        self._run_id = self._client.create_run(experiment_id, run_name=name).info.run_id
        for key, value in _flat(params):
            self._client.log_param(self._run_id, key, str(value)[:_MAX_PARAM_CHARACTERS])

    def epoch(self, result: EpochResult) -> None:
        """Log each curve at the epoch."""
        for key, value in _values(result):
            self._client.log_metric(self._run_id, key, value, step=result.epoch)

    def close(self) -> None:
        """End the run."""
        self._client.set_terminated(self._run_id)


class TensorboardTracker:
    """One folder of TensorBoard events."""

    def __init__(self, config: TrackingConfig, *, name: str) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415
        except ImportError:
            raise _missing("tensorboard") from None
        self._writer = SummaryWriter(os.path.join(config.tensorboard or "", name))

    def epoch(self, result: EpochResult) -> None:
        """Write each curve at the epoch."""
        for key, value in _values(result):
            self._writer.add_scalar(key, value, result.epoch)

    def close(self) -> None:
        """Flush and close the file."""
        self._writer.close()


class TrackedProgress:
    """A progress that passes everything on, and gives trackers the results of epochs."""

    def __init__(self, progress: Progress, trackers: Sequence[Tracker]) -> None:
        self._progress = progress
        self._trackers = list(trackers)

    def stage(self, text: str) -> None:
        """Pass it on."""
        self._progress.stage(text)

    def start(self, total_samples: int, done_samples: int) -> None:
        """Pass it on."""
        self._progress.start(total_samples, done_samples)

    def advance(self, results: int, rejects: int) -> None:
        """Pass it on."""
        self._progress.advance(results, rejects)

    def training(self, event: TrainingEvent) -> None:
        """Pass it on, and its result to the trackers."""
        self._progress.training(event)
        result = event.result
        if result is not None:
            self._tell(lambda tracker: tracker.epoch(result))

    def close(self) -> None:
        """Close the trackers."""
        self._tell(lambda tracker: tracker.close())

    def _tell(self, say: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                say(tracker)
            except Exception as error:  # whatever a tracker's library raises
                self._trackers.remove(tracker)
                _report_failure(type(tracker).__name__, error)


@contextmanager
def tracked(
    progress: Progress, config: TrackingConfig, *, name: str, params: Mapping[str, Any]
) -> Iterator[TrackedProgress]:
    """The progress with the config's trackers behind it; they are closed at the end.

    Raises ConfigError if the library of a tracker is not installed; one that cannot be reached is left out.
    """
    makers: list[Callable[[], Tracker]] = []
    if config.mlflow_uri is not None:
        makers.append(lambda: MlflowTracker(config, name=name, params=params))
    if config.tensorboard is not None:
        makers.append(lambda: TensorboardTracker(config, name=name))
    watched = TrackedProgress(progress, [tracker for maker in makers if (tracker := _made(maker))])
    try:
        yield watched
    finally:
        watched.close()


def _made(maker: Callable[[], Tracker]) -> Tracker | None:
    try:
        return maker()
    except ConfigError:
        raise
    except Exception as error:  # an unreachable server, a full disk: nothing that a training depends on
        _report_failure("tracker", error)
        return None


def _report_failure(name: str, error: Exception) -> None:
    reason = (str(error).splitlines() or [""])[0]
    print(f"convoy: {name} failed and is left out: {reason}", file=sys.stderr, flush=True)


def _missing(package: str) -> ConfigError:
    return ConfigError(
        f"the package {package} is not installed",
        where="tracking",
        next_step="pip install 'convoy-vision[tracking]'",
    )


def _values(result: EpochResult) -> Iterator[tuple[str, float]]:
    for key in _CURVES:
        value = getattr(result, key)
        if value is not None:
            yield key, value


def _flat(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in params.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", value
