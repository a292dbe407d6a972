"""What a training worker leaves on the board, so that the restarted group does not meet the same error again."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from ray.train import WorkerGroupError

from convoy.cluster import training, training_group, training_loop
from convoy.cluster.library_versions import library_versions
from convoy.cluster.ray_data import first_cause
from convoy.cluster.training import WorkerOptions, fit_workers, train_worker
from convoy.cluster.training_board import Board
from convoy.core.errors import ConvoyError, RunCancelled, TrainingError
from made_training import GroupOfOne, digit_rows, training_spec

OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 14.58 GiB of which 1.20 GiB is"
    " free. Process 7 has 13.38 GiB memory in use. If reserved memory is large try PYTORCH_ALLOC_CONF"
)


class _Method:
    """A method of an actor that answers at once."""

    def __init__(self, method: Any) -> None:
        self.remote = method


class _Handle:
    """Ray's handle of a board that lives here."""

    def __init__(self, board: Board) -> None:
        self.failure, self.give_up = _Method(board.failure), _Method(board.give_up)


class _TooLarge:
    """A worker whose batch no GPU can hold."""

    def __init__(self, *_: object) -> None:
        raise torch.OutOfMemoryError(OUT_OF_MEMORY)


def test_a_batch_that_no_gpu_can_hold_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "get", lambda value: value)
    monkeypatch.setattr(training_group, "TrainingGroup", GroupOfOne)
    monkeypatch.setattr(training_loop, "TrainingWorker", _TooLarge)
    spec = training_spec(tmp_path, digit_rows(tmp_path, 10))
    config = {
        "spec": spec.model_dump_json(),
        "board": _Handle(Board()),
        "versions": library_versions(),
    }
    with pytest.raises(TrainingError) as first:
        train_worker(config)
    # Ray Train starts the group once more: it ends at once, with the same error.
    again = train_worker(config)[training._FAILURE]
    assert isinstance(again, ConvoyError)
    assert str(again) == str(first.value)
    # Who wants no restart is told the same.
    assert first_cause(WorkerGroupError("rank 0 failed", {0: first.value})) is first.value
    assert "Tried to allocate 2.00 GiB. GPU 0 has" in again.what
    assert "PYTORCH" not in again.what
    for setting in ("recipe.accumulate", "recipe.batch_size", "resolution_px", "bf16", "--new-run"):
        assert setting in again.next_step


class _Single:
    """A worker whose network meets a batch of one image."""

    def __init__(self, *_: object) -> None:
        torch.nn.BatchNorm1d(3)(torch.zeros(1, 3))


def test_what_a_network_refuses_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "get", lambda value: value)
    monkeypatch.setattr(training_group, "TrainingGroup", GroupOfOne)
    monkeypatch.setattr(training_loop, "TrainingWorker", _Single)
    spec = training_spec(tmp_path, digit_rows(tmp_path, 10))
    config = {"spec": spec.model_dump_json(), "board": _Handle(Board()), "versions": library_versions()}
    with pytest.raises(TrainingError, match="more than 1 value per channel") as first:
        train_worker(config)
    assert str(train_worker(config)[training._FAILURE]) == str(first.value)
    assert "recipe.accumulate" in first.value.next_step


def test_workers_that_tell_nothing_are_not_waited_for_once_the_run_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check() -> None:
        raise RunCancelled("the run was given up")

    given_up = threading.Event()
    monkeypatch.setattr(training, "actor_here", lambda cls: SimpleNamespace(remote=lambda: None))
    monkeypatch.setattr(training, "BoardReader", lambda board: SimpleNamespace(take=list))
    monkeypatch.setattr(training, "_trainer", lambda *_: SimpleNamespace(fit=given_up.wait))
    plan = fit_workers(WorkerOptions(), [{"CPU": 2.0, "GPU": 0.0}])
    assert plan is not None
    spec = training_spec(tmp_path, digit_rows(tmp_path, 10))
    with pytest.raises(RunCancelled):
        training._train_group(spec, plan, lambda event: None, check)
    given_up.set()
