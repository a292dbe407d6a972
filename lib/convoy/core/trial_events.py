"""What a running search tells of its trials. Values that every floor shares."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from convoy.core.config import StrictModel


class TrialState(StrEnum):
    """How far a trial is; all but the first are final."""

    RUNNING = "running"
    FINISHED = "finished"  # trained, evaluated, and its predictions are kept
    STOPPED = "stopped"  # ended early, by the scheduler or because the budget was used up
    FAILED = "failed"


class TrialStatus(StrictModel):
    """One trial as it stands. `values` are what the search chose, by dotted key.

    `top1` is measured on validation rows: that of the last epoch, or of the whole evaluation once finished.
    """

    trial: str
    state: TrialState
    values: dict[str, Any]
    epoch: int | None = None
    top1: float | None = None
    images_per_s: float | None = None
    seconds: float | None = None
    reason: str | None = None
