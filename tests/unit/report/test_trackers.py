"""Trackers get the curves of a training, and never fail it."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from convoy.core.config import StrictModel, load_config
from convoy.core.errors import ConfigError
from convoy.core.progress import Silent
from convoy.core.tracking import TrackingConfig
from convoy.core.training_events import EpochResult, TrainingEvent
from convoy.report.trackers import Outcome, TrackedProgress, final_figures, make_trackers, tracked
from made_events import epoch_result, training_event

# Words of a class map are no names that MLflow takes, and a config has more keys than one request may carry.
PARAMS = {
    "recipe": {"batch_size": 32},
    "tap": None,
    "class_map": {"dog (brown)": "dog"},
    "many": {f"key_{number}": number for number in range(150)},
}


class Recorder(Silent):
    def __init__(self) -> None:
        self.events: list[TrainingEvent] = []

    def training(self, event: TrainingEvent) -> None:
        self.events.append(event)


class Breaking:
    def __init__(self) -> None:
        self.calls = 0

    def open(self, run_id: str | None) -> None:
        pass

    def epochs(self, results: Sequence[EpochResult]) -> None:
        self.calls += 1
        raise OSError("the disk of the tracker is full")

    def finish(self, metrics: Mapping[str, float]) -> None:
        raise AssertionError("it was left out")

    def close(self, outcome: Outcome) -> None:
        raise AssertionError("it was left out")


RUN_ID = "train-0001"


def call(
    config: TrackingConfig,
    *events: TrainingEvent,
    error: type[BaseException] | None = None,
    params: Mapping[str, Any] = PARAMS,
) -> None:
    """A call of the job that tells these events, and ends well or in an error."""
    with tracked(Silent(), config, name="pets", params=params) as watched:
        for event in events:
            watched.training(event)
        if error is not None:
            raise error
        watched.finish({"top1": 0.6875}, events[0].run_id if events else None)


def train(config: TrackingConfig) -> list[TrainingEvent]:
    recorder = Recorder()
    with tracked(recorder, config, name="pets", params=PARAMS) as watched:
        watched.training(training_event())
        watched.training(training_event(result=epoch_result()))
        watched.finish({"top1": 0.6875}, RUN_ID)
    return recorder.events


def train_in_two_calls(config: TrackingConfig) -> None:
    """A worker is lost in the third epoch, and then the first call is killed; the checkpoint is of the first epoch."""
    first, second, third = (epoch_result(epoch=number, train_loss=1 / number) for number in (1, 2, 3))
    begun = [training_event(result=first), training_event(result=second)]
    resumed = [training_event(history=(first,)), training_event(result=second)]
    with pytest.raises(Interrupted):
        call(config, *begun, *resumed, error=Interrupted)
    call(config, *resumed, training_event(result=third), params=PARAMS | {"tap": "other"})


class Interrupted(BaseException):
    pass


def mlflow_run(uri: str) -> Run:
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("tests")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    return run


@pytest.fixture
def local_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrackingConfig:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return TrackingConfig(mlflow_uri=f"file://{tmp_path}/mlruns", mlflow_experiment="tests")


def test_tensorboard_gets_every_curve(tmp_path: Path) -> None:
    train(TrackingConfig(tensorboard=str(tmp_path)))
    events = EventAccumulator(str(tmp_path / "pets" / RUN_ID))
    events.Reload()
    (point,) = events.Scalars("val_top1")
    assert (point.step, round(point.value, 6)) == (2, 0.7)
    assert "train_loss" in events.Tags()["scalars"]
    (final,) = events.Scalars("final/top1")
    assert (final.step, final.value) == (2, 0.6875)


def test_mlflow_gets_curves_final_figures_and_the_resolved_config(local_mlflow: TrackingConfig) -> None:
    train(local_mlflow)
    run = mlflow_run(local_mlflow.mlflow_uri or "")
    assert run.data.params["recipe.batch_size"] == "32"
    assert run.data.params["class_map"] == "{'dog (brown)': 'dog'}"
    assert len(run.data.params) == 152
    assert run.data.metrics["val_nll"] == pytest.approx(0.625)
    assert run.data.metrics["final/top1"] == pytest.approx(0.6875)
    assert run.info.status == "FINISHED"


@pytest.mark.parametrize(("error", "status"), [(RuntimeError, "FAILED"), (Interrupted, "KILLED")])
def test_mlflow_is_told_how_a_training_ended(
    local_mlflow: TrackingConfig, error: type[BaseException], status: str
) -> None:
    with pytest.raises(error):
        call(local_mlflow, training_event(), error=error)
    assert mlflow_run(local_mlflow.mlflow_uri or "").info.status == status


def test_mlflow_has_a_resumed_training_as_one_run_with_each_epoch_once(local_mlflow: TrackingConfig) -> None:
    train_in_two_calls(local_mlflow)
    run = mlflow_run(local_mlflow.mlflow_uri or "")
    losses = MlflowClient(tracking_uri=local_mlflow.mlflow_uri).get_metric_history(
        run.info.run_id, "train_loss"
    )
    assert sorted((one.step, round(one.value, 3)) for one in losses) == [(1, 1.0), (2, 0.5), (3, 0.333)]
    assert run.data.tags["convoy.run_id"] == RUN_ID
    assert run.info.status == "FINISHED"


def test_tensorboard_has_each_epoch_of_a_resumed_training_once_and_trainings_apart(tmp_path: Path) -> None:
    train_in_two_calls(TrackingConfig(tensorboard=str(tmp_path)))
    call(
        TrackingConfig(tensorboard=str(tmp_path)), training_event(run_id="train-0002", result=epoch_result())
    )
    events = EventAccumulator(str(tmp_path / "pets" / RUN_ID))
    events.Reload()
    assert [one.step for one in events.Scalars("train_loss")] == [1, 2, 3]
    assert [one.step for one in events.Scalars("final/top1")] == [3]
    assert {path.name for path in (tmp_path / "pets").iterdir()} == {RUN_ID, "train-0002"}


def test_a_refused_training_and_one_without_a_run_leave_nothing_and_their_figures(
    local_mlflow: TrackingConfig, tmp_path: Path
) -> None:
    config = local_mlflow.model_copy(update={"tensorboard": str(tmp_path / "events")})
    with pytest.raises(RuntimeError):
        call(config, error=RuntimeError)
    assert not (tmp_path / "mlruns").exists()
    assert not (tmp_path / "events").exists()
    call(config)
    assert mlflow_run(config.mlflow_uri or "").data.metrics == {"final/top1": pytest.approx(0.6875)}
    assert len(list((tmp_path / "events" / "pets").iterdir())) == 1


def test_a_server_that_refuses_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    # Port 9 of this machine has no listener, so the connection is refused.
    assert len(train(TrackingConfig(mlflow_uri="http://127.0.0.1:9"))) == 2
    assert capsys.readouterr().err.count("is left out") == 1


def test_a_server_that_never_answers_costs_seconds_and_leaves_no_setting(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # what a user sets is kept
    before = dict(os.environ)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        started_s = time.monotonic()
        events = train(TrackingConfig(mlflow_uri=f"http://127.0.0.1:{silent.getsockname()[1]}"))
        took_s = time.monotonic() - started_s
    assert len(events) == 2
    assert capsys.readouterr().err.count("is left out") == 1
    assert took_s < 8
    # Libraries leave settings of their own there at their first import.
    assert [key for key in os.environ if key.startswith("MLFLOW_HTTP")] == [
        key for key in before if key.startswith("MLFLOW_HTTP")
    ]


@pytest.mark.parametrize(
    ("config", "module"),
    [
        (TrackingConfig(mlflow_uri="http://127.0.0.1:9"), "mlflow.tracking"),
        (TrackingConfig(tensorboard="events"), "torch.utils.tensorboard"),
    ],
)
def test_a_missing_library_is_a_config_error_that_names_the_extra(
    config: TrackingConfig, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # what the import system takes for "not there"
    with pytest.raises(ConfigError, match=r"convoy-vision\[tracking\]"):
        make_trackers(config, name="pets", params={})


def test_credentials_in_the_uri_are_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_USERNAME") as refused:
        load_config(TrackingConfig, None, ["mlflow_uri=https://me:s3cret@tracking.example.org"])
    assert "s3cret" not in str(refused.value)


def test_final_figures_are_the_measured_values_of_a_report() -> None:
    class Report(StrictModel):
        run: str = "run-1"
        samples: int = 10
        top1: float = 0.5
        nll: float | None = None

    assert final_figures(Report()) == {"top1": 0.5}


def test_a_tracker_that_breaks_is_reported_once_and_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    breaking, recorder = Breaking(), Recorder()
    watched = TrackedProgress(recorder, [breaking])
    for _ in range(3):
        watched.training(training_event(result=epoch_result()))
    watched.finish({"top1": 0.5}, RUN_ID)
    watched.close(Outcome.FINISHED)
    assert breaking.calls == 1
    assert len(recorder.events) == 3
    assert (
        capsys.readouterr().err
        == "convoy: Breaking failed and is left out: the disk of the tracker is full\n"
    )
