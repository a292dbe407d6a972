"""`convoy runs list`: what runs a workspace has, and how far they are, from storage alone."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from pydantic import Field

from convoy.core.config import StrictModel
from convoy.core.epochs import EpochPlan
from convoy.core.errors import OF_ONE_FILE
from convoy.pipelines.runs_state import RunState, age_in_words, dataset_of, opened_utc, run_status, verb_of
from convoy.storage.checkpoints import CheckpointFolder
from convoy.storage.commits import SliceRecord, read_manifest, read_records
from convoy.storage.object_store import ObjectStore
from convoy.storage.runs import RunFolder, RunRecord, open_pointers, run_ids

_THREADS = 8


class TrainingReached(StrictModel):
    """The step of a training's newest checkpoint, of all, and the epoch that this step is in; 0 before the first."""

    step: int
    num_steps: int
    epoch: int
    num_epochs: int


class ListedRun(StrictModel):
    """A run in a line. `held_by` is the driver that has an unfinished run, unless it is known here to have ended.

    `done` of `inputs` rows ended in results or rejects; both are null for trainings and searches, whose work is not
    counted in rows, and for runs that died before their input was frozen. `trained` is how far an unfinished training
    of a network is, as the next command would go on with it.
    """

    run: str
    verb: str
    dataset: str
    state: RunState
    held_by: str | None
    done: int | None
    inputs: int | None
    trained: TrainingReached | None = None
    age: str
    opened_utc: str | None


class UnreadableRun(StrictModel):
    """A run whose files cannot be read: what is wrong, and where."""

    run: str
    what: str
    where: str


class RunList(StrictModel):
    """All runs of a workspace, the newest first, and those that cannot be read."""

    runs: list[ListedRun]
    unreadable: list[UnreadableRun] = Field(default_factory=list)


def list_runs(store: ObjectStore) -> RunList:
    """The runs of a workspace. Of unfinished ones the records of all slices are read, a small file each.

    One that is damaged hides no other; a store that does not answer is an error.
    """
    pointers = open_pointers(store)
    ids = sorted({*run_ids(store), *pointers}, reverse=True)

    def read(run_id: str) -> ListedRun | UnreadableRun:
        try:
            return listed_run(store, run_id, pointers)
        except OF_ONE_FILE as error:
            return UnreadableRun(run=run_id, what=error.what, where=error.where)

    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(read, ids))
    return RunList(
        runs=[one for one in found if isinstance(one, ListedRun)],
        unreadable=[one for one in found if isinstance(one, UnreadableRun)],
    )


def listed_run(store: ObjectStore, run_id: str, pointers: Mapping[str, str]) -> ListedRun:
    """One run in a line, given the pointers to all open ones."""
    folder = RunFolder(store, run_id)
    record = folder.record()
    status = run_status(folder, pointers)
    opened = opened_utc(run_id, record)
    return ListedRun(
        run=run_id,
        verb="" if record is None else verb_of(record),
        dataset="" if record is None else dataset_of(record),
        state=status.state,
        held_by=status.held_by,
        done=_rows_done(folder, record, status.state),
        inputs=record.num_inputs if record and record.groups else None,
        trained=None if status.state is RunState.FINISHED else _training_reached(store, record),
        age=age_in_words(opened),
        opened_utc=None if opened is None else opened.isoformat(),
    )


def finished_slices(folder: RunFolder) -> list[SliceRecord]:
    """One record for each slice that is done: of the manifest, or, before it is published, of any finished attempt."""
    manifest = read_manifest(folder)
    if manifest is not None:
        return list(manifest.slices)
    return list({record.slice: record for record in read_records(folder)}.values())


def _rows_done(folder: RunFolder, record: RunRecord | None, state: RunState) -> int | None:
    if record is None or not record.groups:
        return None
    if state is RunState.FINISHED:
        return record.num_inputs
    return sum(one.num_results + one.num_rejects for one in finished_slices(folder))


def _training_reached(store: ObjectStore, record: RunRecord | None) -> TrainingReached | None:
    """How far the run of a network is; None for all other runs, and where nothing but a head is trained."""
    plan = {} if record is None else record.settings.get("setup", {}).get("plan", {})
    num_epochs = sum(phase["epochs"] for phase in plan.get("phases", ()))
    if record is None or not num_epochs:
        return None
    num_rows = record.settings["train"]["num_rows"]
    steps_an_epoch = EpochPlan(num_rows=num_rows, batch_size=plan["batch_size"]).num_steps
    step = CheckpointFolder(store, record.run_id).newest_step()
    return TrainingReached(
        step=step,
        num_steps=num_epochs * steps_an_epoch,
        epoch=-(-step // steps_an_epoch),
        num_epochs=num_epochs,
    )
