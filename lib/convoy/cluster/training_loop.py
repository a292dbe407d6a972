"""The training worker: phases, epochs and steps, with checkpoints from which it goes on to the bit.

Every worker of the group runs this same code. Order, augmentation, dropout and learning rate are pure functions
of the spec, the position and the worker's rank, so all that a checkpoint needs beside tensors are its position and
the history.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from convoy.cluster.batch_feed import BatchFeed, EpochOrder
from convoy.cluster.feed_opening import open_feed
from convoy.cluster.image_loading import PreparedBatch, RejectedRow
from convoy.cluster.timetable import Timetable
from convoy.cluster.training_board import BoardWriter
from convoy.cluster.training_checkpoints import EpochSoFar, Position, TrainingCheckpoints
from convoy.cluster.training_group import TrainingGroup
from convoy.cluster.training_meter import EpochMeter
from convoy.cluster.training_results import TrainingOutcome, write_train_rejects, write_weights
from convoy.cluster.training_spec import TeacherRows, TrainingSpec
from convoy.core.crash_points import CrashPoint, crash_point
from convoy.core.errors import DataError
from convoy.core.processes import keep_freed_memory
from convoy.core.training_events import EpochResult
from convoy.storage.object_store import ObjectStore
from convoy.storage.stores import open_store
from convoy.storage.teacher_logits import read_teacher_logits
from convoy.vision.averaging import build_keeper, first_kept_phase, measure_batchnorm, swapped_in
from convoy.vision.backbones import build_network, depth_axis
from convoy.vision.distillation import Teacher
from convoy.vision.forward import open_device
from convoy.vision.freezing import freeze, frozen_stages
from convoy.vision.learner import Learner, TrainBatch, validation_sums, with_group_batchnorm
from convoy.vision.presets import EvalPreset, at_resolution
from convoy.vision.training_config import Phase, WeightAveraging
from convoy.vision.weights import load_weights, read_state_dict

# Between two looks at the loss, each of which waits for the device and for the group: at most so many steps, and
# fewer where they would take longer than so many seconds.
_STEPS_BETWEEN_LOOKS = 20
_SECONDS_BETWEEN_LOOKS = 5.0
# Batches from which the BatchNorm statistics of averaged weights are measured.
_BATCHNORM_STEPS = 100


class LossNotFinite(Exception):
    """The loss or a weight is no finite number any more; all workers find out at the same step."""


class _Validation(NamedTuple):
    """Mean NLL and top-1 of the usable validation rows, None where there are none, and how many are not usable."""

    nll: float | None
    top1: float | None
    rejects: int


class TrainingWorker:
    """One worker of the group, from its start or restart to the end of the training."""

    def __init__(self, spec: TrainingSpec, group: TrainingGroup, board: Any | None) -> None:
        keep_freed_memory()
        open_device(spec.num_threads)
        self._spec, self._group = spec, group
        self._board = BoardWriter(board if group.is_first else None)
        self._store = open_store(spec.workspace)
        self._network = build_network(spec.backbone)
        self._axis = depth_axis(spec.backbone, self._network)
        self._keeper = build_keeper(spec.recipe)
        # By row: a row that cannot be used is rejected anew in every epoch.
        self._rejects: dict[int, RejectedRow] = {}
        self._told: set[str] = set()
        self._train = spec.train.read(self._store)
        labels_N = self._train["label"].to_numpy()
        order = EpochOrder(spec, labels_N, rank=group.rank, num_workers=group.num_workers)
        self._plan = order.plan
        self._times = Timetable(
            spec.run_id, spec.phases, num_steps=order.plan.num_steps, num_rows=spec.train.num_rows
        )
        val = None if spec.val is None else spec.val.read(self._store)
        self._teacher = None if spec.teacher is None else _read_teacher(self._store, spec.teacher)
        self._feed: BatchFeed = open_feed(spec, self._train, val, order, group)
        self._checkpoints = TrainingCheckpoints(self._store, spec, group)
        # The step of the training from which the next look is due: soon, as nothing is known of the steps' pace.
        self._next_look = 0
        self._resume()

    def run(self) -> TrainingOutcome:
        """Train what is left, write the weights, and return what is to be known of them."""
        try:
            while self._position.phase < len(self._spec.phases):
                self._train_phase(self._spec.phases[self._position.phase])
            return self._finish()
        except LossNotFinite:
            self._checkpoints.close()
            diverged = self._times.last_step(self._position, self._history)
            return TrainingOutcome(diverged=diverged, history=tuple(self._history))

    def _resume(self) -> None:
        """Go on from the newest checkpoint that is whole, or begin with the initial weights."""
        resumed = self._checkpoints.newest()
        self._history: list[EpochResult] = list(resumed.history)
        self._rejects = {reject.row: reject for reject in resumed.rejects}
        self._position, self._broken_off = resumed.position, resumed.epoch
        self._packed, self._scaler = resumed.tensors, dict(resumed.scaler)
        if self._packed is not None:
            self._packed.load_network(self._network)
        else:
            state = read_state_dict(self._store.get(self._spec.initial_weights_key).data)
            load_weights(self._network, state)
        self._network.to(device=self._group.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self._packed is not None:
            self._packed.load_keeper(self._keeper, list(resumed.scores), self._group.device)
        is_shared = self._spec.recipe.sync_batchnorm is True and self._group.num_workers > 1
        # torch has it for GPUs only.
        if is_shared and self._group.device.type == "cuda":
            self._network = with_group_batchnorm(self._network)
        if resumed.notes:
            event = self._times.event(self._position, history=resumed.history, notes=resumed.notes)
            self._board.post(event)

    def _train_phase(self, phase: Phase) -> None:
        freeze(self._network, self._axis, frozen_stages(phase))
        compiled = torch.compile(self._network) if self._spec.recipe.compile else self._network
        weights = self._spec.class_weights
        self._learner = Learner(
            self._network,
            self._axis,
            model=self._group.wrap(compiled),  # type: ignore[arg-type]
            preset=self._preset(phase),
            phase=phase,
            recipe=self._spec.recipe,
            class_weights_K=None if weights is None else torch.tensor(weights),
            num_workers=self._group.num_workers,
        )
        if self._packed is not None and not self._position.begins_phase:
            self._packed.load_optimiser(self._learner.optimiser)
            self._learner.scaler.load_state_dict(self._scaler)
        self._packed = None
        averaging, phases = self._spec.recipe.averaging, self._spec.phases
        is_kept = self._position.phase >= first_kept_phase(averaging, phases, self._spec.preset)
        is_last = False
        while not is_last:
            result = self._train_epoch(phase)
            self._history.append(result)
            is_last = self._position.epoch + 1 == phase.epochs or self._is_stuck(phase)
            self._position = (
                Position(phase=self._position.phase + 1) if is_last else self._position.next_epoch()
            )
            if is_kept:
                score = -result.train_loss if result.val_top1 is None else result.val_top1
                left = self._times.epochs_left(self._position)
                self._keeper.after_epoch(self._network, score=score, epochs_left=left)
            self._board.post(self._times.epoch_event(self._position, result))
            self._save_if_due(at_once=is_last or self._checkpoints.is_late())

    def _train_epoch(self, phase: Phase) -> EpochResult:
        position, learner = self._position, self._learner
        num_steps = self._plan.num_steps
        learner.begin_epoch()
        learner.sums_3 += self._broken_off.sums.to(learner.device)
        meter = EpochMeter(self._broken_off.spent)
        self._broken_off = EpochSoFar()
        epoch = self._times.epoch(position)
        steps = self._feed.steps(epoch, position.step, self._preset(phase))
        for step in range(position.step, num_steps):
            passes = meter.waiting_for(steps)
            self._rejects |= {reject.row: reject for one in passes for reject in one.rejects}
            self._tell(note for one in passes for note in one.notes)
            learner.step(
                [self._taught(one) for one in passes],
                num_group_rows=self._group.total_rows(sum(len(one.rows_B) for one in passes)),
                factor=self._times.rate(self._position),
                step=self._times.step(self._position),
                rank=self._group.rank,
            )
            meter.count(len(self._plan.batch(step)))
            self._keeper.after_step(self._network)
            self._position = position.at_step(step + 1)
            crash_point(CrashPoint.TRAINING_STEP)
            if step + 1 < num_steps:
                self._between_steps(meter)
        return self._measure_epoch(phase, epoch, meter)

    def _tell(self, notes: Iterable[str]) -> None:
        """Tell each note once; of the first worker, as only that has a board."""
        if new := tuple(dict.fromkeys(note for note in notes if note not in self._told)):
            self._told.update(new)
            self._board.post(self._times.event(self._position, notes=new))

    def _taught(self, prepared: PreparedBatch) -> TrainBatch:
        """The batch with what the teacher says of its images, if there is one."""
        if self._teacher is None:
            return prepared.batch
        return replace(prepared.batch, soft=self._teacher.targets(prepared.rows_B))

    def _between_steps(self, meter: EpochMeter) -> None:
        step, is_late = self._times.step(self._position), False
        if step >= self._next_look:
            sums = self._finite_sums()
            self._next_look = step + self._steps_to_next_look(meter)
            is_late = self._checkpoints.is_late()
            if self._board.is_due():
                event = self._times.event(
                    self._position, images_per_s=meter.images_per_s, train_loss=float(sums[0] / sums[2])
                )
                self._board.post(event)
        self._save_if_due(at_once=is_late, meter=meter)

    def _steps_to_next_look(self, meter: EpochMeter) -> int:
        """As many on every worker, by the pace of the first one."""
        steps = _SECONDS_BETWEEN_LOOKS / meter.seconds_a_step
        return int(self._group.number_of_first(min(max(1, int(steps)), _STEPS_BETWEEN_LOOKS)))

    def _measure_epoch(self, phase: Phase, epoch: int, meter: EpochMeter) -> EpochResult:
        """The epoch's losses over the whole group, and the validation of the weights that would be kept."""
        loss_sum, num_correct, num_rows = self._finite_sums().tolist()
        # The sums wait for the device, and the validation is no part of what the training takes.
        spent, images_per_s = meter.spent, meter.images_per_s
        if not num_rows:
            raise DataError(
                f"none of {self._spec.train.num_rows} training images could be used",
                where=self._spec.run_id,
                next_step="see why one of them fails: `convoy cache` lists every reject with its reason; once the"
                " dataset is frozen anew, train with --new-run",
            )
        averaged = self._spec.recipe.averaging is WeightAveraging.EMA
        with swapped_in(self._network, self._keeper.kept() if averaged else None):
            validated = self._validate(phase, epoch)
        return EpochResult(
            phase=phase.name,
            epoch=epoch + 1,
            phase_epoch=self._position.epoch + 1,
            train_loss=loss_sum / num_rows,
            train_top1=num_correct / num_rows,
            val_nll=validated.nll,
            val_top1=validated.top1,
            val_rejects=validated.rejects,
            learning_rate=self._learner.optimiser.param_groups[-1]["lr"],
            images=int(num_rows),
            rejects=self._spec.train.num_rows - int(num_rows),
            seconds=spent.seconds,
            wait_s=spent.wait_s,
            images_per_s=images_per_s,
        )

    def _validate(self, phase: Phase, epoch: int) -> _Validation:
        """Over the validation rows after an epoch, each row counted once over the group."""
        if self._spec.val is None:
            return _Validation(None, None, rejects=0)
        group, sums = self._group, torch.zeros(3, dtype=torch.float64, device=self._group.device)
        preset = self._preset(phase)
        group.share_buffers(self._network)
        self._network.eval()
        for one in self._feed.validation(epoch, preset):
            if len(one.batch.labels_B):
                sums += validation_sums(self._network, preset, one.batch, self._spec.recipe.precision)
        nll, correct, rows = group.total(sums).tolist()
        if not math.isfinite(nll):
            raise LossNotFinite
        rejects = self._spec.val.num_rows - int(rows)
        return _Validation(nll / rows, correct / rows, rejects) if rows else _Validation(None, None, rejects)

    def _finite_sums(self) -> torch.Tensor:
        sums = self._group.total(self._learner.sums_3)
        if not bool(sums.isfinite().all()):
            raise LossNotFinite
        return sums

    def _save_if_due(self, *, at_once: bool, meter: EpochMeter | None = None) -> None:
        """Within an epoch, that of the `meter`, or between two."""
        if not (at_once or self._checkpoints.is_due(self._times.step(self._position))):
            return
        epoch = EpochSoFar() if meter is None else EpochSoFar(self._finite_sums(), meter.spent)
        saved = self._checkpoints.save(
            self._times.step(self._position),
            self._network,
            self._learner,
            self._keeper,
            self._position,
            epoch=epoch,
            history=self._history,
            rejects=self._group_rejects(),
        )
        if not self._group.from_first(saved):
            raise LossNotFinite
        self._tell(self._checkpoints.notes)

    def _finish(self) -> TrainingOutcome:
        kept = self._keeper.kept()
        phase = self._spec.phases[-1]
        if kept is not None:
            self._network.load_state_dict(kept)
            if self._spec.recipe.averaging in (WeightAveraging.SWA, WeightAveraging.SOUP):
                self._measure_batchnorm(phase)
        validated = self._final_validation(phase)
        self._checkpoints.close()
        self._tell(self._checkpoints.notes)
        rejects = self._group_rejects()
        outcome = TrainingOutcome(
            history=tuple(self._history),
            val_nll=validated.nll,
            val_top1=validated.top1,
            val_rejects=validated.rejects,
            reject_codes=Counter(reject.code.value for reject in rejects),
        )
        if not self._group.is_first:
            return outcome
        rejects_key = write_train_rejects(self._store, self._spec.run_id, self._train, rejects)
        outcome = outcome.model_copy(update={"rejects_key": rejects_key})
        return write_weights(self._store, self._spec.run_id, self._network, outcome)

    def _final_validation(self, phase: Phase) -> _Validation:
        """Of the weights that are written: if they are those that the last epoch was measured with, its own."""
        if self._history and self._spec.recipe.averaging in (WeightAveraging.LAST, WeightAveraging.EMA):
            last = self._history[-1]
            return _Validation(last.val_nll, last.val_top1, last.val_rejects)
        return self._validate(phase, self._times.num_epochs - 1)

    def _group_rejects(self) -> list[RejectedRow]:
        gathered = {reject.row: reject for reject in self._group.gather(list(self._rejects.values()))}
        return [gathered[row] for row in sorted(gathered)]

    def _measure_batchnorm(self, phase: Phase) -> None:
        preset, device = self._preset(phase), self._group.device
        steps = self._feed.steps(0, max(0, self._plan.num_steps - _BATCHNORM_STEPS), preset)
        batches = (one.batch for passes in steps for one in passes)
        images = (batch.images_BCHW.to(device) for batch in batches if self._gives_statistics(batch))
        measure_batchnorm(self._network, self._axis, frozen_stages(phase), images, preset)
        self._group.average_buffers(self._network)

    def _gives_statistics(self, batch: TrainBatch) -> bool:
        """Whether no worker's pass lacks images: where BatchNorm is the group's, the others would wait for it."""
        lacking = torch.tensor(int(batch.lacks_statistics), device=self._group.device)
        return not int(self._group.total(lacking))

    def _is_stuck(self, phase: Phase) -> bool:
        """Whether validation top-1 has not risen for as many epochs as the recipe has patience."""
        patience = self._spec.recipe.patience_epochs
        scores = [one.val_top1 for one in self._history if one.phase == phase.name]
        if patience is None or any(score is None for score in scores):
            return False
        return len(scores) - 1 - scores.index(max(scores)) >= patience  # type: ignore[type-var]

    def _preset(self, phase: Phase) -> EvalPreset:
        return at_resolution(self._spec.preset, phase.resolution_px)


def _read_teacher(store: ObjectStore, teacher: TeacherRows) -> Teacher:
    return Teacher(read_teacher_logits(store, teacher.key), teacher.distillation)
