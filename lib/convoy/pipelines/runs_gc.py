"""`convoy runs gc`: remove what unfinished runs left that no command goes on with, and what finished trainings left.

Never what a finished run, a commit, or a pointer names, and never what a driver is at work on.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from convoy.core.config import StrictModel
from convoy.core.errors import OF_ONE_FILE
from convoy.pipelines.runs_state import SAMPLE_OF, Changes, RunState, opened_utc, run_status
from convoy.storage.checkpoints import training_leftovers
from convoy.storage.commits import FEATURES
from convoy.storage.conditional_put import PROBE_FOLDER
from convoy.storage.documents import read_json
from convoy.storage.leases import GIVEN_UP, TTL_S, living_holders
from convoy.storage.local_store import LocalStore
from convoy.storage.object_store import ObjectInfo, ObjectStore
from convoy.storage.runs import RunFolder, close_pointer, open_pointers, run_ids

OLDER_THAN_DAYS = 7.0
# No write of a file takes so long.
_UNFINISHED_AFTER_S = 86_400.0
_THREADS = 8
_RUN_RECORD = "run.json"
# Where the answers to evaluations and scorings are named (see `committee_predictions`).
_ANSWERS = "predictions/"


class Garbage(StrictModel):
    """Files that nothing needs: those of a run, or leftovers of probes and of writes."""

    what: str
    why: str
    files: int
    size_bytes: int


class KeptRun(StrictModel):
    """An unfinished run that is not touched, and why."""

    run: str
    why: str


class GcReport(StrictModel):
    """What was found, and whether it was removed: `changes` is `made` then, else `shown`."""

    changes: Changes
    files: int
    size_bytes: int
    garbage: list[Garbage]
    kept: list[KeptRun]


def collect_garbage(
    store: ObjectStore,
    changes: Changes,
    *,
    older_than_days: float = OLDER_THAN_DAYS,
    watch_s: float = TTL_S,
) -> GcReport:
    """Find, and with `made` remove, the files of runs that were given up, and of older ones that were left behind.

    Of finished trainings what nothing reads any more goes, where it was not deleted at their end: checkpoints, what
    Ray Train wrote, points of a first head.

    In a local folder also what writers that were killed left half done, after a day.

    Files of probes count if they are still there after `watch_s` seconds; leases that are held are watched for
    their time to live. Both waits come only where there is something to wait for.
    """
    found, kept, finished = _candidates(store, older_than_days)
    living = living_holders([candidate.folder for candidate in found])
    kept += [KeptRun(run=run_id, why="a driver is at work on it") for run_id in sorted(living)]
    ended = _ended_since([candidate.folder for candidate in found])
    kept += [KeptRun(run=run_id, why="it has ended in the meantime") for run_id in sorted(ended - living)]
    unneeded = [candidate for candidate in found if candidate.folder.run_id not in living | ended]
    if changes is Changes.MADE:
        for candidate in unneeded:
            if candidate.pointer_key is not None:
                close_pointer(store, candidate.pointer_key, candidate.folder.run_id)
    garbage = [
        _removed(store, candidate.folder.run_id, candidate.why, _files_of(candidate.folder), changes)
        for candidate in unneeded
    ]
    garbage += [
        _removed(store, folder.run_id, "what a finished training no longer needs", files, changes)
        for folder, files in _leftovers_of(finished)
    ]
    leftovers = _probe_leftovers(store, watch_s)
    if leftovers:
        garbage.append(_removed(store, PROBE_FOLDER, "a probe that was killed", leftovers, changes))
    if isinstance(store, LocalStore) and (unfinished := store.list_unfinished(_UNFINISHED_AFTER_S)):
        if changes is Changes.MADE:
            store.delete_unfinished(unfinished)
        garbage.append(_garbage(store.root_uri, "half of files whose writers were killed", unfinished))
    return GcReport(
        changes=changes,
        files=sum(one.files for one in garbage),
        size_bytes=sum(one.size_bytes for one in garbage),
        garbage=garbage,
        kept=kept,
    )


@dataclass(frozen=True, slots=True)
class _Candidate:
    folder: RunFolder
    why: str
    pointer_key: str | None


def _candidates(
    store: ObjectStore, older_than_days: float
) -> tuple[list[_Candidate], list[KeptRun], list[RunFolder]]:
    """Runs that no command goes on with, as far as their files say, those that must stay, and the finished ones."""
    ids = run_ids(store)
    # After the ids, as the pointer to a run is older than its files: so none is taken for left behind that opens now.
    pointers = open_pointers(store)
    folders = [
        RunFolder(store, run_id) for run_id in ids if run_id not in pointers or _is_sample(store, run_id)
    ]
    with ThreadPoolExecutor(_THREADS) as pool:
        states = list(pool.map(lambda folder: run_status(folder, pointers).state, folders))
    known = list(zip(folders, states, strict=True))
    unfinished = [(folder, state) for folder, state in known if state is not RunState.FINISHED]
    named = _named_runs(store) if unfinished else set()
    oldest = datetime.now(UTC) - timedelta(days=older_than_days)
    found, kept = [], []
    for folder, state in unfinished:
        reason = _reason_to_keep(folder, state, named, oldest)
        pointer_key = pointers.get(folder.run_id)
        if reason is None:
            why = "given up" if state is RunState.GIVEN_UP else "unfinished, and no command goes on with it"
            found.append(_Candidate(folder, why, pointer_key))
        else:
            kept.append(KeptRun(run=folder.run_id, why=reason))
    return found, kept, [folder for folder, state in known if state is RunState.FINISHED]


def _is_sample(store: ObjectStore, run_id: str) -> bool:
    """Whether an open run is the sample of a dry run that was killed: no scoring goes on with it."""
    try:
        record = RunFolder(store, run_id).record()
    except OF_ONE_FILE:
        return False
    return record is not None and SAMPLE_OF in record.config


def _ended_since(found: Sequence[RunFolder]) -> set[str]:
    """The runs that have ended while leases were watched, as their drivers were at the last steps."""
    named = _named_runs(found[0].store) if found else set()
    return {folder.run_id for folder in found if folder.run_id in named or folder.is_finished()}


def _leftovers_of(finished: Sequence[RunFolder]) -> Iterator[tuple[RunFolder, list[ObjectInfo]]]:
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(training_leftovers, finished)
        yield from ((folder, files) for folder, files in zip(finished, found, strict=True) if files)


def _reason_to_keep(folder: RunFolder, state: RunState, named: set[str], oldest: datetime) -> str | None:
    if folder.run_id in named:
        return "a commit or a pointer names its files"
    try:
        record = folder.record()
    except OF_ONE_FILE as error:
        return f"its record, which says where its files lie, cannot be read: {error.what}"
    if state is RunState.GIVEN_UP:
        return None
    opened = opened_utc(folder.run_id, record)
    if opened is None:
        return "nothing says how old it is: give it up with convoy runs cancel"
    return "it may be young: see --older-than" if opened > oldest else None


def _named_runs(store: ObjectStore) -> set[str]:
    """The runs whose files others name: in the commits of feature sets, and as answers to evaluations and scorings."""
    commits = {
        info.key.rpartition("/")[2].removesuffix(".json")
        for set_id in store.list_folders(FEATURES)
        for info in store.list_objects(f"{FEATURES}{set_id}/commits/")
    }
    pointers = [info.key for info in store.list_objects(_ANSWERS)]
    with ThreadPoolExecutor(_THREADS) as pool:
        documents = list(pool.map(lambda key: read_json(store, key), pointers))
    return commits | {document["run_id"] for document in documents if document}


def _files_of(folder: RunFolder) -> Iterator[ObjectInfo]:
    """All files of a run; its record and the sign that it was given up last, so that a killed gc can be repeated."""
    record = folder.record()
    outputs = {} if record is None else record.outputs
    for prefix in outputs.values():
        if not prefix.startswith(folder.prefix):
            yield from folder.store.list_objects(prefix)
    last = {folder.key(_RUN_RECORD), folder.key(GIVEN_UP)}
    own = list(folder.store.list_objects(folder.prefix))
    yield from (info for info in own if info.key not in last)
    yield from (info for info in reversed(own) if info.key in last)


def _probe_leftovers(store: ObjectStore, watch_s: float) -> list[ObjectInfo]:
    before = list(store.list_objects(PROBE_FOLDER))
    if not before:
        return []
    time.sleep(watch_s)
    after = {info.key for info in store.list_objects(PROBE_FOLDER)}
    return [info for info in before if info.key in after]


def _removed(
    store: ObjectStore, what: str, why: str, files: Iterable[ObjectInfo], changes: Changes
) -> Garbage:
    listed: Sequence[ObjectInfo] = list(files)
    if changes is Changes.MADE:
        store.delete(info.key for info in listed)
    return _garbage(what, why, listed)


def _garbage(what: str, why: str, files: Sequence[ObjectInfo]) -> Garbage:
    return Garbage(what=what, why=why, files=len(files), size_bytes=sum(info.size_bytes for info in files))
