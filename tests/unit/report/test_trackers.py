"""Trackers get the curves of a training, and never fail it."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from convoy.core.progress import Silent
from convoy.core.tracking import TrackingConfig
from convoy.core.training_events import EpochResult, TrainingEvent
from convoy.report.trackers import TrackedProgress, tracked
from made_events import epoch_result, training_event


class Recorder(Silent):
    def __init__(self) -> None:
        self.events: list[TrainingEvent] = []

    def training(self, event: TrainingEvent) -> None:
        self.events.append(event)


class Breaking:
    def __init__(self) -> None:
        self.calls = 0

    def epoch(self, result: EpochResult) -> None:
        self.calls += 1
        raise OSError("the disk of the tracker is full")

    def close(self) -> None:
        raise AssertionError("it was left out")


def train(config: TrackingConfig) -> list[TrainingEvent]:
    recorder = Recorder()
    with tracked(
        recorder, config, name="pets", params={"recipe": {"batch_size": 32}, "tap": None}
    ) as watched:
        watched.training(training_event())
        watched.training(training_event(result=epoch_result()))
    return recorder.events


def test_tensorboard_gets_every_curve(tmp_path: Path) -> None:
    train(TrackingConfig(tensorboard=str(tmp_path)))
    events = EventAccumulator(str(tmp_path / "pets"))
    events.Reload()
    (point,) = events.Scalars("val_top1")
    assert (point.step, round(point.value, 6)) == (2, 0.7)
    assert "train_loss" in events.Tags()["scalars"]


def test_mlflow_gets_curves_and_the_resolved_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = f"file://{tmp_path}/mlruns"
    train(TrackingConfig(mlflow_uri=uri, mlflow_experiment="tests"))
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("tests")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.params == {"recipe.batch_size": "32"}
    assert run.data.metrics["val_nll"] == pytest.approx(0.625)
    assert run.info.status == "FINISHED"


def test_a_server_that_does_not_answer_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    # Port 9 of this machine has no listener, so the connection is refused.
    assert len(train(TrackingConfig(mlflow_uri="http://127.0.0.1:9"))) == 2
    assert "is left out" in capsys.readouterr().err


def test_a_tracker_that_breaks_is_reported_once_and_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    breaking, recorder = Breaking(), Recorder()
    watched = TrackedProgress(recorder, [breaking])
    for _ in range(3):
        watched.training(training_event(result=epoch_result()))
    watched.close()
    assert breaking.calls == 1
    assert len(recorder.events) == 3
    assert (
        capsys.readouterr().err
        == "convoy: Breaking failed and is left out: the disk of the tracker is full\n"
    )
