"""Where a position lies in a training: pure arithmetic over phases, epochs and steps."""

from __future__ import annotations

from collections.abc import Sequence

from convoy.cluster.training_checkpoints import Position
from convoy.cluster.training_results import StepTaken
from convoy.core.training_events import EpochResult, TrainingEvent
from convoy.vision.optimisation import schedule_factor
from convoy.vision.training_config import Phase


class Timetable:
    """The phases of the training of a run, all epochs of which have `num_steps` steps over `num_rows` images."""

    def __init__(self, run_id: str, phases: Sequence[Phase], *, num_steps: int, num_rows: int) -> None:
        self._run_id, self._phases = run_id, phases
        self.num_steps = num_steps
        self._images_a_step = num_rows / num_steps
        self.num_epochs = sum(phase.epochs for phase in phases)

    def epoch(self, position: Position) -> int:
        """The position's epoch over all phases, from 0."""
        return sum(phase.epochs for phase in self._phases[: position.phase]) + position.epoch

    def step(self, position: Position) -> int:
        """Steps from the start of the training, counting the epochs that an early stop left out."""
        return self.epoch(position) * self.num_steps + position.step

    def epochs_left(self, position: Position) -> int:
        """Epochs that are still to begin or in progress."""
        return self.num_epochs - self.epoch(position)

    def last_step(self, position: Position, history: Sequence[EpochResult]) -> StepTaken:
        """The step before a position: where an epoch begins there, the last one of the epoch that ended before."""
        ended = None if position.step else history[-1]
        return StepTaken(
            phase=ended.phase if ended else self._phases[position.phase].name,
            epoch=ended.epoch if ended else self.epoch(position) + 1,
            num_epochs=self.num_epochs,
            step=position.step or self.num_steps,
            num_steps=self.num_steps,
        )

    def rate(self, position: Position) -> float:
        """The learning rate of the position's step as a share of its phase's peak."""
        phase = self._phases[position.phase]
        step = position.epoch * self.num_steps + position.step
        return schedule_factor(phase.schedule, step, phase.epochs * self.num_steps)

    def event(
        self,
        position: Position,
        *,
        images_per_s: float = 0.0,
        train_loss: float | None = None,
        history: tuple[EpochResult, ...] = (),
        notes: tuple[str, ...] = (),
    ) -> TrainingEvent:
        """A glimpse of the epoch at the position."""
        left = self.num_epochs * self.num_steps - self.step(position)
        return TrainingEvent(
            run_id=self._run_id,
            phase=self._phases[min(position.phase, len(self._phases) - 1)].name,
            epoch=min(self.epoch(position) + 1, self.num_epochs),
            num_epochs=self.num_epochs,
            step=position.step,
            num_steps=self.num_steps,
            steps_left=left,
            images_per_s=images_per_s,
            seconds_left=left * self._images_a_step / images_per_s if images_per_s else None,
            train_loss=train_loss,
            history=history,
            notes=notes,
        )

    def epoch_event(self, position: Position, result: EpochResult) -> TrainingEvent:
        """The end of an epoch; the position is what comes after it."""
        event = self.event(position, images_per_s=result.images_per_s, train_loss=result.train_loss)
        ended = {"phase": result.phase, "epoch": result.epoch, "step": self.num_steps, "result": result}
        return event.model_copy(update=ended)
