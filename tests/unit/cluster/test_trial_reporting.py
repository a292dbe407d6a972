"""What the driver of a search makes of how its trials end, on Ray's own errors but without its processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle, tune
from ray.exceptions import ActorDiedError, RayTaskError

from convoy.cluster.search_plan import GivenUp, TrialPoint
from convoy.cluster.trial_queue import METRIC, POINT
from convoy.cluster.trial_reporting import CURVE, EPOCH, Obstructed, TrialReporter, TrialWatch
from convoy.core.errors import ExitCode, StorageFull
from convoy.core.search_space import Values
from convoy.core.training_events import EpochResult, TrainingEvent
from convoy.core.trial_events import TrialState, TrialStatus

FULL = StorageFull("the disk is full", where="checkpoints/", next_step="free space")


@dataclass
class MemoryJournal:
    is_full: bool = False
    given_up: dict[str, GivenUp] = field(default_factory=dict)
    finished: set[str] = field(default_factory=set)

    def point(self, index: int, values: Values) -> TrialPoint:
        return TrialPoint(trial=f"{index:03}", index=index, values=values)

    def drawn(self, point: TrialPoint) -> None:
        raise AssertionError("a watch draws nothing")

    def ended(self, point: TrialPoint) -> TrialStatus | None:
        if point.trial not in self.finished:
            return None
        return TrialStatus(trial=point.trial, state=TrialState.FINISHED, values=point.values)

    def give_up(self, point: TrialPoint, end: GivenUp) -> None:
        if self.is_full:
            raise FULL
        self.given_up[point.trial] = end


class TuneTrial:
    """What a watch asks of a trial of Ray Tune's."""

    def __init__(self, index: int = 0) -> None:
        self.config = {POINT: TrialPoint(trial=f"{index:03}", index=index, values={}).model_dump_json()}


class FailedTuneTrial(TuneTrial):
    """One that knows where the driver wrote its last error."""

    def __init__(self, folder: Path, error: Exception) -> None:
        super().__init__()
        path = folder / "error.pkl"
        path.write_bytes(cloudpickle.dumps(error))
        self.pickled_error_file = str(path)


def watched(journal: MemoryJournal) -> TrialWatch:
    return TrialWatch(journal, lambda statuses: None, deadline_s=float("inf"))


def from_trial(error: Exception) -> Exception:
    """An error as it comes out of the trial's actor."""
    raised: Exception = RayTaskError("train", "a long trace", error).as_instanceof_cause()
    return raised


def test_what_is_not_a_trials_fault_ends_the_search_and_leaves_no_document(tmp_path: Path) -> None:
    journal = MemoryJournal()
    watch = watched(journal)
    stopper = Obstructed(watch)
    assert not stopper.stop_all()
    watch.on_trial_error(0, [], FailedTuneTrial(tmp_path, from_trial(FULL)))
    assert stopper.stop_all()
    assert journal.given_up == {}
    assert watch.obstacle is not None
    assert str(watch.obstacle) == str(FULL)
    assert watch.obstacle.exit_code is ExitCode.STOPPED_RESUMABLE


def test_a_trial_whose_process_was_lost_too_often_is_recorded_with_the_reason(tmp_path: Path) -> None:
    journal = MemoryJournal()
    watch = watched(journal)
    watch.on_trial_error(0, [], FailedTuneTrial(tmp_path, ActorDiedError()))
    assert watch.obstacle is None
    assert journal.given_up["000"].state is TrialState.FAILED
    assert "the actor died" in journal.given_up["000"].reason.lower()


def test_a_document_that_cannot_be_left_ends_the_search(tmp_path: Path) -> None:
    watch = watched(MemoryJournal(is_full=True))
    watch.on_trial_complete(0, [], FailedTuneTrial(tmp_path, from_trial(FULL)))
    assert watch.obstacle is FULL


def test_trials_that_still_run_when_the_time_is_up_end_with_their_epochs() -> None:
    """Ray Tune stops them without a word to its callbacks."""
    journal = MemoryJournal(finished={"001"})
    watch = watched(journal)
    running, finished = TuneTrial(0), TuneTrial(1)
    for trial in (running, finished):
        watch.on_trial_start(0, [], trial)
    for epoch in (1, 2):
        watch.on_trial_result(
            0, [], running, {EPOCH: epoch, METRIC: epoch / 10, CURVE: ((epoch, epoch / 10),)}
        )
    watch.on_trial_complete(0, [], finished)
    (end,) = watch.cut_short().items()
    assert end[0] == "000"
    assert (end[1].state, end[1].epochs) == (TrialState.STOPPED, ((1, 0.1), (2, 0.2)))
    assert "time budget" in end[1].reason
    assert end[1].seconds > 0
    # Their documents are left by whoever knows that nobody else runs them.
    assert journal.given_up == {}


def test_a_trial_that_is_stopped_when_the_time_is_up_is_cut_short_and_not_given_up() -> None:
    journal = MemoryJournal(finished={"001"})
    watch = TrialWatch(journal, lambda statuses: None, deadline_s=0.0)
    for index in range(2):
        watch.on_trial_start(0, [], TuneTrial(index))
        watch.on_trial_complete(0, [], TuneTrial(index))
    assert list(watch.cut_short()) == ["000"]
    assert journal.given_up == {}


def trained(epoch: int, val_top1: float) -> EpochResult:
    numbers = dict.fromkeys(EpochResult.model_fields, 1)
    return EpochResult.model_validate(
        {**numbers, "phase": "body", "epoch": epoch, "phase_epoch": epoch, "val_top1": val_top1}
    )


def told(epoch: int, result: EpochResult | None, *history: EpochResult) -> TrainingEvent:
    """An event of a training of four epochs of one step."""
    return TrainingEvent(
        run_id="run",
        phase="body",
        epoch=epoch,
        num_epochs=4,
        step=1,
        num_steps=1,
        steps_left=4 - epoch,
        images_per_s=1.0,
        seconds_left=None,
        train_loss=None,
        result=result,
        history=history,
    )


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    monkeypatch.setattr(tune, "report", found.append)
    return found


def test_a_trial_that_goes_on_reports_the_epochs_of_the_earlier_call(reports: list[dict[str, Any]]) -> None:
    reporter = TrialReporter()
    reporter.training(told(2, None, trained(1, 0.1), trained(2, 0.2)))
    reporter.training(told(3, trained(3, 0.3)))
    reporter.training(told(4, trained(4, 0.4)))
    curve = ((1, 0.1), (2, 0.2), (3, 0.3))
    assert [report[CURVE] for report in reports] == [curve[:2], curve]
    assert [report.get(EPOCH) for report in reports] == [None, 3], "what was decided is not decided anew"
    watch, trial = watched(MemoryJournal()), TuneTrial()
    watch.on_trial_start(0, [], trial)
    for report in reports:
        watch.on_trial_result(0, [], trial, report)
    assert watch.cut_short()["000"].epochs == curve


def test_the_epochs_of_a_trial_with_folds_are_those_of_its_first_fold(reports: list[dict[str, Any]]) -> None:
    reporter, watch, trial = TrialReporter(), watched(MemoryJournal()), TuneTrial()
    for fold in (0, 1):
        for epoch in (1, 2, 3):
            reporter.training(told(epoch, trained(epoch, epoch / 10 + fold / 2)))
    # A lost process: the next one knows the first fold only from its bundle.
    reporter = TrialReporter()
    reporter.training(told(1, None, trained(1, 0.6)))
    watch.on_trial_start(0, [], trial)
    for report in reports:
        watch.on_trial_result(0, [], trial, report)
    assert watch.cut_short()["000"].epochs == ((1, 0.1), (2, 0.2), (3, 0.3))
