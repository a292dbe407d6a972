"""When a training worker saves what, and what it finds when it starts again."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from convoy.cluster.image_loading import RejectedRow
from convoy.cluster.training_group import TrainingGroup
from convoy.cluster.training_meter import Spent
from convoy.cluster.training_spec import TrainingSpec
from convoy.core.config import StrictModel
from convoy.core.training_events import EpochResult
from convoy.storage.checkpoints import AsyncCheckpointWriter, CheckpointFolder, CheckpointRecord
from convoy.storage.object_store import ObjectStore
from convoy.vision.averaging import WeightKeeper
from convoy.vision.learner import Learner
from convoy.vision.training_state import PackedTraining, is_finite, pack_training

# The newest may turn out damaged, so one more is kept.
_KEPT_CHECKPOINTS = 2


class Position(StrictModel):
    """The next step of a training: phase, epoch within it, step within that, all from 0."""

    phase: int = 0
    epoch: int = 0
    step: int = 0

    @property
    def begins_phase(self) -> bool:
        """Whether no step of the phase was taken yet, so that it has no optimiser state."""
        return not self.epoch and not self.step

    def next_epoch(self) -> Position:
        """The first step of the next epoch."""
        return Position(phase=self.phase, epoch=self.epoch + 1)

    def at_step(self, step: int) -> Position:
        """Another step of the same epoch."""
        return Position(phase=self.phase, epoch=self.epoch, step=step)


def _zeros() -> Tensor:
    return torch.zeros(3, dtype=torch.float64)


@dataclass(frozen=True, slots=True)
class EpochSoFar:
    """An epoch that is under way: the sums over its steps, and what these took."""

    sums: Tensor = field(default_factory=_zeros)
    spent: Spent = field(default_factory=Spent)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """Where a worker begins. The sums of `epoch`, where one was broken off, are the group's; `tensors` may be None."""

    position: Position
    epoch: EpochSoFar
    history: tuple[EpochResult, ...] = ()
    scores: tuple[float, ...] = ()
    rejects: tuple[RejectedRow, ...] = ()
    scaler: dict[str, Any] = field(default_factory=dict)
    tensors: PackedTraining | None = None
    notes: tuple[str, ...] = ()


class TrainingCheckpoints:
    """The checkpoints of one run as its workers use them: the first one writes, all of them read the same."""

    def __init__(self, store: ObjectStore, spec: TrainingSpec, group: TrainingGroup) -> None:
        self._folder = CheckpointFolder(store, spec.run_id)
        self._writer = AsyncCheckpointWriter(self._folder, keep_newest=_KEPT_CHECKPOINTS)
        self._group = group
        self._interval_steps, self._interval_s = spec.checkpoint_steps, 60 * spec.checkpoint_minutes
        self._last_step, self._last_s = 0, time.monotonic()

    @property
    def notes(self) -> tuple[str, ...]:
        """What went wrong beside the uploads, and costs nothing but room."""
        return self._writer.notes

    def newest(self) -> Resumed:
        """The newest checkpoint that is whole, or the beginning; what was damaged is in the notes, and deleted."""
        notes: tuple[str, ...] = ()
        loaded = None
        if self._group.is_first:
            loaded, damaged = self._folder.newest_intact()
            self._folder.discard(damaged)
            notes = tuple(f"checkpoint of step {one.step} cannot be used: {one.reason}" for one in damaged)
        chosen = self._group.from_first(loaded and loaded.record.model_dump(mode="json"))
        if chosen is None:
            return Resumed(position=Position(), epoch=EpochSoFar(), notes=notes)
        record = CheckpointRecord.model_validate(chosen)
        self._last_step = record.step
        details = record.details
        # The sums are the whole group's, so one worker carries them on.
        sums = torch.tensor(details["sums"], dtype=torch.float64) if self._group.is_first else _zeros()
        return Resumed(
            position=Position.model_validate(details["position"]),
            # Checkpoints of before do not tell what was spent.
            epoch=EpochSoFar(sums, Spent.model_validate(details.get("spent", {}))),
            history=tuple(EpochResult.model_validate(one) for one in details["history"]),
            scores=tuple(details["scores"]),
            rejects=tuple(RejectedRow.model_validate(one) for one in details["rejects"]),
            scaler=details["scaler"],
            # Only the others have yet to read what the first one chose.
            tensors=PackedTraining(self._folder.read(record) if loaded is None else loaded.data),
            notes=(*notes, f"going on from the checkpoint of step {record.step}"),
        )

    def is_due(self, step: int) -> bool:
        """Whether so many steps were taken since the last checkpoint that the next is due."""
        return step - self._last_step >= self._interval_steps

    def is_late(self) -> bool:
        """Whether so much time has gone by; all workers ask together, and are told what the first one's clock says."""
        return bool(self._group.number_of_first(time.monotonic() - self._last_s >= self._interval_s))

    def save(
        self,
        step: int,
        network: nn.Module,
        learner: Learner,
        keeper: WeightKeeper,
        position: Position,
        *,
        epoch: EpochSoFar,
        history: Sequence[EpochResult],
        rejects: Iterable[RejectedRow],
    ) -> bool:
        """Copy the state and upload it beside the training; False, and nothing saved, if a weight is not finite.

        Waits for the upload before it, and raises that one's error. The interval counts from here, so that a kill loses
        at most the interval under way, and while the one before it is still being uploaded that too.
        """
        self._last_step, self._last_s = step, time.monotonic()
        if not self._group.is_first:
            return True
        if not is_finite(network):
            return False
        self._writer.submit(
            step,
            pack_training(network, learner.optimiser, keeper),
            details={
                "position": position.model_dump(),
                "sums": epoch.sums.tolist(),
                "spent": epoch.spent.model_dump(),
                "history": [one.model_dump(mode="json") for one in history],
                "scores": keeper.scores,
                "rejects": [one.model_dump(mode="json") for one in rejects],
                "scaler": learner.scaler.state_dict(),
            },
        )
        return True

    def close(self) -> None:
        """Wait for the last upload, and raise its error."""
        self._writer.close()
