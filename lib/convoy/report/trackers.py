"""Trackers: the same curves and figures to MLflow or TensorBoard. One that fails is left out."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import Enum
from typing import Any, Protocol

from pydantic import BaseModel

from convoy.core.batching import batched
from convoy.core.errors import ConfigError
from convoy.core.progress import Progress
from convoy.core.tracking import TrackingConfig
from convoy.core.training_events import EpochResult, TrainingEvent
from convoy.core.trial_events import TrialStatus

_CURVES = ("train_loss", "train_top1", "val_nll", "val_top1", "learning_rate", "images_per_s")
# MLflow's client waits for minutes by itself; a training must not. What the user has set stays.
_MLFLOW_PATIENCE = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "3",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
}
_MAX_PARAM_CHARACTERS = 500
_MAX_PARAMS_A_REQUEST = 100
# By which a run of Convoy is found again in MLflow.
_RUN_TAG = "convoy.run_id"


class Outcome(Enum):
    """How a training ended, in MLflow's words."""

    FINISHED = "FINISHED"
    FAILED = "FAILED"
    STOPPED = "KILLED"


class Tracker(Protocol):
    """Somewhere else where a training is kept. What is told again of an epoch is left out."""

    def open(self, run_id: str | None) -> None:
        """Begin what is kept of a run, or go on with it; a training without a run begins anew each time."""
        ...

    def epochs(self, results: Sequence[EpochResult]) -> None:
        """Keep the figures of these epochs."""
        ...

    def finish(self, metrics: Mapping[str, float]) -> None:
        """Keep the figures of the evaluation after the last epoch."""
        ...

    def close(self, outcome: Outcome) -> None:
        """The training has ended."""
        ...


class MlflowTracker:
    """One MLflow run of an experiment for each run, with the resolved config as its parameters."""

    def __init__(self, config: TrackingConfig, *, name: str, params: Mapping[str, Any]) -> None:
        try:
            from mlflow.entities import Metric, Param  # noqa: PLC0415
            from mlflow.tracking import MlflowClient  # noqa: PLC0415
        except ImportError:
            raise missing_package("mlflow") from None
        self._metric, self._param, self._new_client = Metric, Param, MlflowClient
        self._config, self._name, self._params = config, name, params
        self._epochs: set[int] = set()

    def open(self, run_id: str | None) -> None:
        """Go on with the MLflow run that is tagged with the run's id, or create it."""
        with mlflow_patience():
            self._client = self._new_client(tracking_uri=self._config.mlflow_uri)
            experiment = self._client.get_experiment_by_name(self._config.mlflow_experiment)
            experiment_id = (
                experiment.experiment_id
                if experiment is not None
                else self._client.create_experiment(self._config.mlflow_experiment)
            )
            begun = (
                self._client.search_runs([experiment_id], f"tags.`{_RUN_TAG}` = '{run_id}'") if run_id else []
            )
            if begun:
                self._run_id = begun[0].info.run_id
                self._client.update_run(self._run_id, status="RUNNING")
                self._epochs = {one.step for one in self._client.get_metric_history(self._run_id, _CURVES[0])}
                return
            tags = {_RUN_TAG: run_id} if run_id else {}
            self._run_id = self._client.create_run(experiment_id, tags=tags, run_name=self._name).info.run_id
            entries = [
                self._param(key, str(value)[:_MAX_PARAM_CHARACTERS]) for key, value in _flat(self._params)
            ]
            for some in batched(entries, _MAX_PARAMS_A_REQUEST):
                self._client.log_batch(self._run_id, params=some)

    def epochs(self, results: Sequence[EpochResult]) -> None:
        """Log each curve at each epoch."""
        for result in results:
            if result.epoch not in self._epochs:
                self._epochs.add(result.epoch)
                self._log(_curve_values(result), result.epoch)

    def finish(self, metrics: Mapping[str, float]) -> None:
        """Log each figure as `final/<name>` at the last epoch."""
        self._log(_final_values(metrics), max(self._epochs, default=0))

    def close(self, outcome: Outcome) -> None:
        """End the run with the status of the outcome."""
        with mlflow_patience():
            self._client.set_terminated(self._run_id, status=outcome.value)

    def _log(self, values: Mapping[str, float], epoch: int) -> None:
        now_ms = int(time.time() * 1000)
        entries = [self._metric(key, value, now_ms, epoch) for key, value in values.items()]
        with mlflow_patience():
            self._client.log_batch(self._run_id, metrics=entries)


class TensorboardTracker:
    """One folder of TensorBoard events for each run, below that of the name."""

    def __init__(self, config: TrackingConfig, *, name: str) -> None:
        try:
            from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: PLC0415
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415
        except ImportError:
            raise missing_package("tensorboard") from None
        self._new_reader, self._new_writer = EventAccumulator, SummaryWriter
        self._folder = os.path.join(config.tensorboard or "", name)
        self._epochs: set[int] = set()

    def open(self, run_id: str | None) -> None:
        """Go on in the folder of the run; one without an id is named by the time."""
        folder = os.path.join(self._folder, run_id or f"{datetime.now(UTC):%Y%m%d-%H%M%S}")
        self._writer = self._new_writer(folder)
        written = self._new_reader(folder, size_guidance={"scalars": 0}).Reload()
        if _CURVES[0] in written.Tags()["scalars"]:
            self._epochs = {one.step for one in written.Scalars(_CURVES[0])}

    def epochs(self, results: Sequence[EpochResult]) -> None:
        """Write each curve at each epoch."""
        for result in results:
            if result.epoch not in self._epochs:
                self._epochs.add(result.epoch)
                self._write(_curve_values(result), result.epoch)

    def finish(self, metrics: Mapping[str, float]) -> None:
        """Write each figure as `final/<name>` at the last epoch."""
        self._write(_final_values(metrics), max(self._epochs, default=0))

    def close(self, outcome: Outcome) -> None:
        """Flush and close the file; it has no place for the outcome."""
        self._writer.close()

    def _write(self, values: Mapping[str, float], epoch: int) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, epoch)
        # By itself it writes every two minutes, which a person who watches takes for a standstill.
        self._writer.flush()


class TrackedProgress:
    """A progress that passes everything on, and gives trackers the results of epochs.

    They are opened by the first that there is to tell: what is refused before leaves nothing there.
    """

    def __init__(self, progress: Progress, trackers: Sequence[Tracker]) -> None:
        self._progress = progress
        self._trackers = list(trackers)
        self._is_open = False

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
        """Pass it on, and its results, or those before its checkpoint, to the trackers."""
        self._progress.training(event)
        self._open(event.run_id)
        results = [one for one in (*event.history, event.result) if one is not None]
        self._tell(lambda tracker: tracker.epochs(results))

    def trials(self, statuses: Sequence[TrialStatus]) -> None:
        """Pass it on."""
        self._progress.trials(statuses)

    def finish(self, metrics: Mapping[str, float], run_id: str | None) -> None:
        """Give the trackers the figures of the evaluation of a training, and of which run that was."""
        self._open(run_id)
        self._tell(lambda tracker: tracker.finish(metrics))

    def close(self, outcome: Outcome) -> None:
        """Close the trackers that were opened."""
        if self._is_open:
            self._tell(lambda tracker: tracker.close(outcome))

    def _open(self, run_id: str | None) -> None:
        if not self._is_open:
            self._is_open = True
            self._tell(lambda tracker: tracker.open(run_id))

    def _tell(self, say: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                say(tracker)
            except Exception as error:  # an unreachable server, a full disk: no training depends on it
                self._trackers.remove(tracker)
                report_failure(type(tracker).__name__, error)


def make_trackers(config: TrackingConfig, *, name: str, params: Mapping[str, Any]) -> list[Tracker]:
    """The trackers that the config asks for, which are yet to be opened.

    Raises ConfigError if the library of a tracker is not installed.
    """
    made: list[Tracker] = []
    if config.mlflow_uri is not None:
        made.append(MlflowTracker(config, name=name, params=params))
    if config.tensorboard is not None:
        made.append(TensorboardTracker(config, name=name))
    return made


@contextmanager
def tracked(
    progress: Progress, config: TrackingConfig, *, name: str, params: Mapping[str, Any]
) -> Iterator[TrackedProgress]:
    """The progress with the config's trackers behind it; at the end they are told how it went.

    Raises ConfigError if the library of a tracker is not installed.
    """
    watched = TrackedProgress(progress, make_trackers(config, name=name, params=params))
    outcome = Outcome.STOPPED
    try:
        yield watched
        outcome = Outcome.FINISHED
    except Exception:
        outcome = Outcome.FAILED
        raise
    finally:
        watched.close(outcome)


def final_figures(report: BaseModel) -> dict[str, float]:
    """The figures at the top of a report that are measured, such as `top1` and `nll`; for `finish`."""
    return {key: value for key, value in report if isinstance(value, float)}


@contextmanager
def mlflow_patience() -> Iterator[None]:
    """MLflow reads its patience from the environment at each call; afterwards that is as it was."""
    ours = {key: value for key, value in _MLFLOW_PATIENCE.items() if key not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for key in ours:
            os.environ.pop(key, None)


def report_failure(name: str, error: Exception) -> None:
    """Say on stderr that something beside the work failed, in one line."""
    reason = (str(error).splitlines() or [""])[0]
    print(f"convoy: {name} failed and is left out: {reason}", file=sys.stderr, flush=True)


def missing_package(package: str) -> ConfigError:
    """The error of a tracker without its library, which names the extra."""
    return ConfigError(
        f"the package {package} is not installed",
        where="tracking",
        next_step="pip install 'convoy-vision[tracking]'",
    )


def _curve_values(result: EpochResult) -> dict[str, float]:
    values = {key: getattr(result, key) for key in _CURVES}
    return {key: value for key, value in values.items() if value is not None}


def _final_values(metrics: Mapping[str, float]) -> dict[str, float]:
    return {f"final/{key}": value for key, value in metrics.items()}


def _flat(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Sections as dotted keys; a mapping of free words, such as a class map, stays one value."""
    for key, value in params.items():
        if isinstance(value, Mapping) and all(word.isidentifier() for word in value):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", value
