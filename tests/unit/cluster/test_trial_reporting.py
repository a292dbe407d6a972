"""What the driver of a search makes of how its trials end, on Ray's own errors but without its processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ray import cloudpickle
from ray.exceptions import ActorDiedError, RayTaskError

from convoy.cluster.search_plan import GivenUp, TrialPoint
from convoy.cluster.trial_queue import POINT
from convoy.cluster.trial_reporting import Obstructed, TrialWatch
from convoy.core.errors import ExitCode, StorageFull
from convoy.core.search_space import Values
from convoy.core.trial_events import TrialState, TrialStatus

FULL = StorageFull("the disk is full", where="checkpoints/", next_step="free space")


@dataclass
class MemoryJournal:
    is_full: bool = False
    given_up: dict[str, GivenUp] = field(default_factory=dict)

    def point(self, index: int, values: Values) -> TrialPoint:
        return TrialPoint(trial=f"{index:03}", index=index, values=values)

    def drawn(self, point: TrialPoint) -> None:
        raise AssertionError("a watch draws nothing")

    def ended(self, point: TrialPoint) -> TrialStatus | None:
        return None

    def give_up(self, point: TrialPoint, end: GivenUp) -> None:
        if self.is_full:
            raise FULL
        self.given_up[point.trial] = end


class FailedTuneTrial:
    """What a watch asks of a trial of Ray Tune's: its config, and where the driver wrote its last error."""

    def __init__(self, folder: Path, error: Exception) -> None:
        self.config = {POINT: TrialPoint(trial="000", index=0, values={}).model_dump_json()}
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
