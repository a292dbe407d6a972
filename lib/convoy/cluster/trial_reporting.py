"""What a trial tells Ray Tune from inside, and what the driver makes of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ray import cloudpickle, tune
from ray.tune import Stopper
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler

from convoy.cluster.ray_data import first_cause
from convoy.cluster.search_plan import EpochAccuracies, GivenUp, SearchJournal, TrialPoint
from convoy.cluster.trial_queue import METRIC, POINT
from convoy.core.errors import OBSTACLES, ConvoyError
from convoy.core.progress import Silent
from convoy.core.training_events import EpochResult, TrainingEvent
from convoy.core.trial_events import TrialState, TrialStatus

EPOCH = "epoch"
# All epochs of the trial so far with their accuracies, also those that an earlier call trained.
CURVE = "curve"
_IMAGES_PER_S = "images_per_s"
_STOPPED_EARLY = "its validation top-1 was not among the best at this epoch"
_TIME_IS_UP = "the time budget was used up"


class TrialReporter(Silent):
    """A trial's progress: every epoch but the last goes to Ray Tune, which may then end the trial.

    Not the last one: a training that is done shall not be thrown away before it is evaluated. Of a trial with a
    training a fold, the curve is that of the first fold.
    """

    def __init__(self) -> None:
        self._curve: dict[int, float] = {}

    def training(self, event: TrainingEvent) -> None:
        """Report a finished epoch, and wait for the scheduler's word; or what was trained before a checkpoint."""
        for one in event.history:
            self._remember(one)
        if event.history:
            # Without an epoch of its own: what was decided then is not decided anew.
            tune.report({CURVE: self._epochs})
        result = event.result
        if result is None or result.val_top1 is None or not event.steps_left:
            return
        self._remember(result)
        report = {EPOCH: result.epoch, METRIC: result.val_top1, _IMAGES_PER_S: result.images_per_s}
        tune.report({**report, CURVE: self._epochs})

    def finish(self, epochs: EpochAccuracies, top1: float) -> None:
        """Report the accuracy of the finished trial."""
        tune.report({EPOCH: epochs[-1][0] if epochs else 0, METRIC: top1, CURVE: epochs})

    @property
    def _epochs(self) -> EpochAccuracies:
        return tuple(sorted(self._curve.items()))

    def _remember(self, result: EpochResult) -> None:
        if result.val_top1 is not None:
            self._curve.setdefault(result.epoch, result.val_top1)


class CurveScheduler(ASHAScheduler):  # type: ignore[misc] # Ray has no types
    """ASHA that knows the whole curve of each trial.

    It files a trial's accuracy in the highest rung that the trial is not in. One that went on from epoch 5 would be
    in the rungs of the epochs before with what it reached later, and new trials would not bear the comparison.
    """

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """The word on the result; filing what is filed already changes nothing."""
        for epoch, top1 in result.get(CURVE, ()):
            if epoch < result.get(EPOCH, math.inf):
                super().on_trial_result(tune_controller, trial, {EPOCH: epoch, METRIC: top1})
        return str(super().on_trial_result(tune_controller, trial, result))


class TrialWatch(tune.Callback):  # type: ignore[misc] # Ray has no types
    """Follows the trials in the driver: shows them, and sees to it that each ended one has its document.

    `obstacle` is what keeps trials from going on and is not their fault: it leaves no document, and ends the search.
    """

    def __init__(
        self,
        journal: SearchJournal,
        show: Callable[[Sequence[TrialStatus]], None],
        *,
        deadline_s: float,
    ) -> None:
        self._journal = journal
        self._show = show
        self._deadline_s = deadline_s
        self._statuses: dict[str, TrialStatus] = {}
        self._epochs: dict[str, dict[int, float]] = {}
        self._started_s: dict[str, float] = {}
        self.obstacle: ConvoyError | None = None

    def __reduce__(self) -> tuple[type[object], tuple[()]]:
        # Tune pickles what it is given, for a restore that never happens.
        return object, ()

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial starts, or starts anew after its process was lost."""
        point = _point(trial)
        self._started_s.setdefault(point.trial, time.monotonic())
        self._update(point)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """A trial reported an epoch, or those of an earlier call."""
        point = _point(trial)
        self._epochs[point.trial] = {**dict(result.get(CURVE, ())), **self._epochs.get(point.trial, {})}
        known = {name: result[name] for name in (EPOCH, METRIC, _IMAGES_PER_S) if name in result}
        self._update(point, **known)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial ended by itself, or was stopped. Once the time is up, one without a document was cut short."""
        is_late = time.monotonic() >= self._deadline_s
        self._end(_point(trial), TrialState.STOPPED, None if is_late else _STOPPED_EARLY)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial's process was lost too often, or raised what may heal and did not."""
        error = _last_error(trial)
        if isinstance(error, OBSTACLES):
            self.obstacle = error
        else:
            self._end(_point(trial), TrialState.FAILED, str(error or "its process was lost"))

    def cut_short(self) -> dict[str, GivenUp]:
        """How the trials that started and did not end have ended, by name, once the time is up.

        Ray Tune stops them without telling its callbacks.
        """
        return {
            trial: self._given_up(trial, TrialState.STOPPED, _TIME_IS_UP)
            for trial, status in self._statuses.items()
            if status.state is TrialState.RUNNING
        }

    def _end(self, point: TrialPoint, state: TrialState, reason: str | None) -> None:
        try:
            self._document(point, state, reason)
        except ConvoyError as error:
            # Ray Tune would take it for an error of the trial.
            self.obstacle = error

    def _document(self, point: TrialPoint, state: TrialState, reason: str | None) -> None:
        """Take the trial's own document, or else leave one for it, if there is a reason why it ended."""
        ended = self._journal.ended(point)
        if ended is None and reason is not None:
            self._journal.give_up(point, self._given_up(point.trial, state, reason))
            ended = self._journal.ended(point)
        if ended is not None:
            self._statuses[point.trial] = ended
        self._show(list(self._statuses.values()))

    def _given_up(self, trial: str, state: TrialState, reason: str) -> GivenUp:
        epochs = tuple(sorted(self._epochs.get(trial, {}).items()))
        return GivenUp(state=state, reason=reason, epochs=epochs, seconds=self._seconds(trial))

    def _update(self, point: TrialPoint, **known: Any) -> None:
        self._statuses[point.trial] = self._status(point).model_copy(update=known)
        self._show(list(self._statuses.values()))

    def _status(self, point: TrialPoint) -> TrialStatus:
        status = self._statuses.get(
            point.trial, TrialStatus(trial=point.trial, state=TrialState.RUNNING, values=point.values)
        )
        return status.model_copy(update={"seconds": self._seconds(point.trial)})

    def _seconds(self, trial: str) -> float:
        """Since it started; 0 for one that did not."""
        now_s = time.monotonic()
        return now_s - self._started_s.get(trial, now_s)


class Obstructed(Stopper):  # type: ignore[misc] # Ray has no types
    """Ends the search as soon as its watch has met an obstacle; trials that run are stopped without a document."""

    def __init__(self, watch: TrialWatch) -> None:
        self._watch = watch

    def __reduce__(self) -> tuple[type[object], tuple[()]]:
        # As for the watch.
        return object, ()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No result is a reason."""
        return False

    def stop_all(self) -> bool:
        """Whether the search shall end."""
        return self._watch.obstacle is not None


def _last_error(trial: Trial) -> ConvoyError | None:
    """What ended a trial's last attempt, or None where its process was just lost."""
    # Where the driver wrote it: `get_pickled_error` looks where it is uploaded to now and again.
    path = trial.pickled_error_file
    return None if path is None else first_cause(cloudpickle.loads(Path(path).read_bytes()))


def _point(trial: Trial) -> TrialPoint:
    return TrialPoint.model_validate_json(trial.config[POINT])
