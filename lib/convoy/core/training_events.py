"""What a running training tells: a glimpse of each epoch, and its result. Values that every floor shares."""

from __future__ import annotations

from collections.abc import Sequence

from convoy.core.config import StrictModel


class EpochResult(StrictModel):
    """One finished epoch. `phase_epoch` counts within its phase from 1, `epoch` over all phases.

    Losses are means over images: `train_loss` as optimised, `val_nll` without smoothing, weights or mixing.
    `wait_s` is how long the training stood still for images. `rejects` and `val_rejects` are images that could not be
    used. Without validation rows the fields of their accuracy are null.
    """

    phase: str
    epoch: int
    phase_epoch: int
    train_loss: float
    train_top1: float
    val_nll: float | None
    val_top1: float | None
    learning_rate: float
    images: int
    rejects: int
    val_rejects: int = 0
    seconds: float
    wait_s: float
    images_per_s: float


def phase_spans(history: Sequence[EpochResult]) -> dict[str, tuple[int, int]]:
    """The first and last epoch of each phase."""
    spans: dict[str, tuple[int, int]] = {}
    for epoch in history:
        first, _ = spans.get(epoch.phase, (epoch.epoch, epoch.epoch))
        spans[epoch.phase] = (first, epoch.epoch)
    return spans


class TrainingEvent(StrictModel):
    """How far an epoch of a run is, with its result if it has just ended. `notes` say what a person should know.

    `steps_left` counts to the end of all phases, `train_loss` is the mean of the epoch so far. `history` are the
    epochs before a checkpoint, told by a training that goes on from it.
    """

    run_id: str
    phase: str
    epoch: int
    num_epochs: int
    step: int
    num_steps: int
    steps_left: int
    images_per_s: float
    seconds_left: float | None
    train_loss: float | None
    result: EpochResult | None = None
    history: tuple[EpochResult, ...] = ()
    notes: tuple[str, ...] = ()
