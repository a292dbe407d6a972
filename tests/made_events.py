"""What a training tells, made for tests of what is shown of it."""

from __future__ import annotations

from typing import Any

from convoy.core.training_events import EpochResult, TrainingEvent


def epoch_result(**values: Any) -> EpochResult:
    """The second of three epochs; `values` replace fields."""
    fields: dict[str, Any] = {
        "phase": "body",
        "epoch": 2,
        "phase_epoch": 1,
        "train_loss": 0.5,
        "train_top1": 0.75,
        "val_nll": 0.625,
        "val_top1": 0.7,
        "learning_rate": 0.01,
        "images": 1000,
        "rejects": 0,
        "seconds": 4.0,
        "wait_s": 0.0,
        "images_per_s": 250.0,
    }
    return EpochResult.model_validate(fields | values)


def training_event(**values: Any) -> TrainingEvent:
    """A glimpse of the middle of the second of three epochs; `values` replace fields."""
    fields: dict[str, Any] = {
        "run_id": "train-0001",
        "phase": "body",
        "epoch": 2,
        "num_epochs": 3,
        "step": 5,
        "num_steps": 10,
        "steps_left": 15,
        "images_per_s": 250.0,
        "seconds_left": 60.0,
        "train_loss": 0.5,
    }
    return TrainingEvent.model_validate(fields | values)
