"""`convoy runs cancel`: give an unfinished run up."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

from convoy.core.config import StrictModel
from convoy.core.errors import ConfigError, PreconditionFailed
from convoy.pipelines.runs_state import RunState, existing_run, run_status
from convoy.storage.commits import read_manifest
from convoy.storage.leases import GIVEN_UP, give_up
from convoy.storage.object_store import ObjectStore
from convoy.storage.runs import RunFolder, close_pointer, open_pointer, open_pointers


class CancelReport(StrictModel):
    """A run that was given up: `before` is the state that it was in, `held_by` the driver that has it."""

    run: str
    before: RunState
    held_by: str | None
    notes: list[str]


def cancel_run(store: ObjectStore, run_id: str) -> CancelReport:
    """Give a run up: its driver stops at its next slice or event, and the same command starts a new run from then on.

    Its files stay until `convoy runs gc`. Raises ConfigError for a run that does not exist, and for one whose results
    are published already. May be repeated.
    """
    pointers = open_pointers(store)
    folder = existing_run(store, run_id, pointers)
    status = run_status(folder, pointers)
    _refuse_published(folder, status.state)
    # In this order a kill between the two leaves a run that nobody goes on with, not one that nobody can leave.
    if run_id in pointers:
        close_pointer(store, pointers[run_id], run_id)
    give_up(folder)
    if read_manifest(folder) is not None:
        _take_back(folder, pointers)
        _refuse_published(folder, run_status(folder, pointers).state)
    return CancelReport(run=run_id, before=status.state, held_by=status.held_by, notes=_notes(status.held_by))


def _take_back(folder: RunFolder, pointers: Mapping[str, str]) -> None:
    """Undo giving up a run that published its results in the meantime: its command can end it again."""
    folder.store.delete([folder.key(GIVEN_UP)])
    if folder.run_id in pointers and not folder.is_finished():
        # Where the same command has begun a new run by now, the driver of this one ends it alone.
        with suppress(PreconditionFailed):
            open_pointer(folder.store, pointers[folder.run_id], folder.run_id)


def _refuse_published(folder: RunFolder, state: RunState) -> None:
    if state is RunState.FINISHED:
        raise ConfigError(
            "the run is finished: there is nothing to give up", where=folder.prefix, next_step="leave it"
        )
    if read_manifest(folder) is not None:
        raise ConfigError(
            "the run has published its results already: only its end is missing",
            where=folder.prefix,
            next_step="run the job's command again, which ends it in seconds",
        )


def _notes(held_by: str | None) -> list[str]:
    if held_by is None:
        return []
    return [
        f"{held_by} stops at its next slice or event, with exit code 6; if it is publishing its results by now, it ends"
        " the run all the same"
    ]
