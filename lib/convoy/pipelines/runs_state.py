"""In what state a run is, from its folder alone: what all commands of `convoy runs` share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

from convoy.storage.leases import is_given_up, read_lease
from convoy.storage.object_store import ObjectStore
from convoy.storage.runs import OPEN_RUNS, RunFolder, RunRecord, require_run

# In the config of a run that scores a sample for a dry run, and is deleted again: the target that it foretells.
SAMPLE_OF = "forecast_of"


class RunState(StrEnum):
    """What becomes of a run: an open one is gone on with by its job's command, one left behind by none."""

    FINISHED = "finished"
    HELD = "held"
    OPEN = "open"
    GIVEN_UP = "given up"
    LEFT_BEHIND = "left behind"


class Changes(StrEnum):
    """Whether a command only says what it would change, or changes it."""

    SHOWN = "shown"
    MADE = "made"


@dataclass(frozen=True, slots=True)
class RunStatus:
    """The state of a run, and who holds it: a process that is not known here to have ended, since when."""

    state: RunState
    held_by: str | None


def run_status(folder: RunFolder, pointers: Mapping[str, str]) -> RunStatus:
    """The state of a run, given the pointers to all open ones (`open_pointers`)."""
    if folder.is_finished():
        return RunStatus(RunState.FINISHED, None)
    lease = read_lease(folder)
    held_by = None if lease is None else lease.at_work
    if is_given_up(folder):
        return RunStatus(RunState.GIVEN_UP, held_by)
    if held_by is not None:
        return RunStatus(RunState.HELD, held_by)
    return RunStatus(RunState.OPEN if folder.run_id in pointers else RunState.LEFT_BEHIND, None)


def existing_run(store: ObjectStore, run_id: str, pointers: Mapping[str, str]) -> RunFolder:
    """The folder of a run, which may have died before its record; ConfigError if there is none."""
    folder = RunFolder(store, run_id, open_key=pointers.get(run_id, ""))
    is_name = run_id != OPEN_RUNS and "/" not in run_id
    left_something = is_name and next(iter(store.list_objects(folder.prefix)), None) is not None
    if run_id not in pointers and not left_something:
        require_run(store, run_id)
    return folder


def verb_of(record: RunRecord) -> str:
    """The verb of a run, with the option by which it is of a sample only."""
    return f"{record.verb} --dry-run" if SAMPLE_OF in record.config else record.verb


def opened_utc(run_id: str, record: RunRecord | None) -> datetime | None:
    """When a run was opened: by its record, or else by the label in front of its id; None if neither says it."""
    try:
        if record is not None:
            return datetime.fromisoformat(record.created_utc)
        return datetime.strptime("-".join(run_id.split("-")[:2]), "%Y%m%d-%H%M%S").replace(tzinfo=UTC)
    except ValueError:
        return None


def age_in_words(opened: datetime | None) -> str:
    """How long ago, in the largest unit that fits; empty if nobody knows."""
    if opened is None:
        return ""
    seconds = max((datetime.now(UTC) - opened).total_seconds(), 0)
    for unit, length_s in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length_s:
            return f"{seconds / length_s:.0f} {unit}"
    return f"{seconds:.0f} s"


def dataset_of(record: RunRecord) -> str:
    """The dataset that a run is about, by its identity."""
    config = record.identity.get("config", {})
    dataset: str = record.identity.get("dataset") or config.get("dataset") or ""
    return dataset
