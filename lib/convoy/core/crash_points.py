"""Named places where a test may kill the process, to prove that the same command then resumes.

`CONVOY_CRASH_POINT=name:n:file` kills the process that arrives as the n-th at that place, with SIGKILL.
Arrivals are counted by the length of the file, over all processes and restarts: so the kill happens once
only, and a file of n bytes or more is the proof that it happened.
"""

from __future__ import annotations

import os
import signal
from enum import StrEnum


class CrashPoint(StrEnum):
    """Every step of a commit, a checkpoint or a kept fit after which a kill must lose and double nothing."""

    RUN_OPENED = "run_opened"
    INPUT_FROZEN = "input_frozen"
    RUN_RECORDED = "run_recorded"
    PART_WRITTEN = "part_written"
    REJECTS_WRITTEN = "rejects_written"
    RECORD_WRITTEN = "record_written"
    SLICE_COLLECTED = "slice_collected"
    ATTEMPTS_CHOSEN = "attempts_chosen"
    MANIFEST_PUBLISHED = "manifest_published"
    LOSERS_DELETED = "losers_deleted"
    SET_COMMITTED = "set_committed"
    SUCCESS_WRITTEN = "success_written"
    RUN_CLOSED = "run_closed"
    HEAD_POINT_KEPT = "head_point_kept"
    TRAINING_STEP = "training_step"
    CHECKPOINT_WRITTEN = "checkpoint_written"
    CHECKPOINT_RECORDED = "checkpoint_recorded"
    WEIGHTS_WRITTEN = "weights_written"
    TRAINING_RECORDED = "training_recorded"
    TRIAL_DRAWN = "trial_drawn"
    TRIAL_TRAINED = "trial_trained"
    TRIAL_RECORDED = "trial_recorded"
    RETRAIN_PLANNED = "retrain_planned"
    ALIASES_CHOSEN = "aliases_chosen"
    ALIASES_MOVED = "aliases_moved"
    RETRAIN_DECIDED = "retrain_decided"


def crash_point(point: CrashPoint) -> None:
    """Kill this process if the environment asks for it here; otherwise do nothing."""
    wanted = os.environ.get("CONVOY_CRASH_POINT", "")
    if not wanted:
        return
    name, nth, counter_path = wanted.split(":", 2)
    if name != point:
        return
    counter = os.open(counter_path, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.write(counter, b".")
    arrival = os.fstat(counter).st_size
    os.close(counter)
    if arrival == int(nth):
        os.kill(os.getpid(), signal.SIGKILL)
