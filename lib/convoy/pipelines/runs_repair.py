"""`convoy runs repair`: remove files that belong to nothing, and set damaged slices aside to be computed again.

A damaged slice is not mended here: its attempt is forgotten and the run opened again, so that the job's own command
computes that slice, and only that, and publishes the run anew. Frozen input and settings stay, and with them the
digest of the rows. On request a slice is set aside for images that could not be fetched, too: they may be given by now,
and to a finished run they would stay rejects. A run of features that `convoy cache` would refuse, as its dataset has
another version by now or as it is of some rows only, stays closed: the next run that needs them adds the rows that are
missing.
"""

from __future__ import annotations

from dataclasses import dataclass

from convoy.core.config import StrictModel
from convoy.core.errors import ConfigError, ConvoyError, DataError, PreconditionFailed, StorageError
from convoy.core.fingerprints import canonical_json
from convoy.pipelines.data_origin import dataset_of_run
from convoy.pipelines.prediction_request import SCORE
from convoy.pipelines.runs_state import Changes
from convoy.pipelines.verify import adds_features, slice_problems
from convoy.storage.commits import (
    FEATURES,
    RunManifest,
    SliceRecord,
    commit_set,
    damaged_records,
    read_manifest,
    read_records,
    record_key,
    stray_files,
    write_record,
)
from convoy.storage.datasets import list_datasets, open_dataset
from convoy.storage.leases import GIVEN_UP, RunLease, hold_run
from convoy.storage.object_store import ObjectInfo, ObjectStore
from convoy.storage.runs import (
    RunFolder,
    RunRecord,
    open_pointer,
    open_pointers,
    parse_slice_name,
    require_run,
)

_MAX_LISTED = 100


class DamagedSlice(StrictModel):
    """A slice with an attempt that does not hold what its record promised, and why."""

    slice: str
    attempt: str
    problem: str


class RepairReport(StrictModel):
    """What a repair finds. `changes` says whether it was only shown, or made.

    `damaged` and `orphans`, the keys of files that belong to nothing, are the first hundred of `num_damaged` and
    `num_orphans`. `retried_images` are those that are tried again, with their `retried_slices`. `left_to_do` is what
    makes the run whole again, or why nothing does.
    """

    run: str
    verb: str
    changes: Changes
    slices: int
    num_damaged: int
    num_orphans: int
    orphan_bytes: int
    retried_slices: int
    retried_images: int
    damaged: list[DamagedSlice]
    orphans: list[str]
    left_to_do: str


def repair_run(
    store: ObjectStore, run_id: str, changes: Changes, *, retry_unfetched: bool = False
) -> RepairReport:
    """Read every file of a run again, and say what is damaged or belongs to nothing; with `made` mend it.

    That holds the run: LeaseHeld if a driver is at work. With `retry_unfetched` slices are set aside too of which
    images could not be fetched, and another try may (`RETRIED_CODES`). Raises ConfigError for a run without slices,
    for rejects of a run of features, and where another unfinished run of the same target is in the way, DataError where
    the frozen input is damaged as well, so that there is nothing to compute from, and where no command would finish the
    run, as its dataset has another version by now.
    """
    folder, run = require_run(store, run_id)
    if not run.groups:
        raise ConfigError(
            f"a {run.verb} has no slices that could be repaired",
            where=folder.prefix,
            next_step="run its command again: a damaged checkpoint is left out, a finished trial is kept",
        )
    if retry_unfetched and adds_features(run):
        raise ConfigError(
            "rejects of features need no repair: the next job that needs them tries those of stage fetch again",
            where=folder.prefix,
            next_step="run convoy cache, or the job that needs the features; repair without --retry-unfetched",
        )
    if changes is Changes.SHOWN:
        findings = _examine(folder, run, retry_unfetched)
        return _report(store, run, findings, changes, _obstacle(folder, run, findings))
    with hold_run(folder) as lease:
        findings = _examine(folder, run, retry_unfetched)
        if (obstacle := _obstacle(folder, run, findings)) is not None:
            raise obstacle
        # First, as records that cannot be read are among them, in whose place sound ones may come.
        store.delete(info.key for info in findings.orphans)
        if findings.takes_back:
            _open_for_command(folder, run, findings, lease)
        _forget(folder, findings)
    return _report(store, run, findings, changes)


@dataclass(frozen=True, slots=True)
class _Findings:
    """The attempts that count: those of the manifest, or, before it is published, all that finished.

    A record that cannot be read is an orphan like the files that only it names. `is_cut_off` says that a repair was
    killed at its last step: the manifest is gone, and the marker that the run is finished is not.
    """

    manifest: RunManifest | None
    is_cut_off: bool
    sound: tuple[SliceRecord, ...]
    damaged: tuple[tuple[SliceRecord, str], ...]
    unfetched: tuple[SliceRecord, ...]
    orphans: tuple[ObjectInfo, ...]

    @property
    def set_aside(self) -> list[SliceRecord]:
        return [*(attempt for attempt, _ in self.damaged), *self.unfetched]

    @property
    def takes_back(self) -> bool:
        """Whether results that were published become those of an unfinished run."""
        return self.is_cut_off or (self.manifest is not None and bool(self.set_aside))


def _examine(folder: RunFolder, run: RunRecord, retry_unfetched: bool) -> _Findings:
    manifest = read_manifest(folder)
    unreadable = damaged_records(folder)
    left_out = {info.key for info in unreadable}
    attempts = list(manifest.slices) if manifest else read_records(folder, left_out=left_out)
    problems = [next(slice_problems(folder, run, attempt), None) for attempt in attempts]
    examined = list(zip(attempts, problems, strict=True))
    whole = [attempt for attempt, problem in examined if problem is None]
    return _Findings(
        manifest=manifest,
        is_cut_off=manifest is None and folder.is_finished(),
        sound=tuple(attempt for attempt in whole if not (retry_unfetched and attempt.unfetched)),
        damaged=tuple((attempt, problem) for attempt, problem in examined if problem is not None),
        unfetched=tuple(attempt for attempt in whole if retry_unfetched and attempt.unfetched),
        orphans=(*unreadable, *stray_files(folder, run, attempts)),
    )


def _obstacle(folder: RunFolder, run: RunRecord, findings: _Findings) -> ConvoyError | None:
    """Why the run cannot be made whole again, before anything of it is touched."""
    try:
        for attempt in findings.set_aside:
            _require_input(folder, run, attempt.slice)
        if findings.takes_back:
            _require_dataset(folder.store, run)
            if _is_gone_on_with(folder.store, run):
                _require_free_pointer(folder.store, run)
    except (ConfigError, DataError) as error:
        return error
    return None


def _open_for_command(folder: RunFolder, run: RunRecord, findings: _Findings, lease: RunLease) -> None:
    """Let a published run be one that a command ends from its sound slices, once the others are forgotten.

    Its manifest is kept aside.
    """
    store, manifest = folder.store, findings.manifest
    if _is_gone_on_with(store, run):
        _open_again(store, run)
    lease.confirm()
    # It was given up while it was published: what is finished once more is not.
    store.delete([folder.key(GIVEN_UP)])
    if manifest is not None:
        _keep_sound(folder, run, manifest, findings.sound, lease.token)


def _forget(folder: RunFolder, findings: _Findings) -> None:
    """Delete what is set aside; a published run is an unfinished one then.

    Killed on the way it is finished as it was, or `is_cut_off`: without its manifest nothing of it is published again
    before the rest is computed. Files go last: what is set aside may be whole, and counts for nothing without records.
    """
    store = folder.store
    store.delete(record_key(attempt) for attempt in findings.set_aside)
    if findings.takes_back:
        store.delete([folder.key("manifest.json")])
        store.delete([folder.key("_SUCCESS")])
    store.delete(file.key for attempt in findings.set_aside for file in attempt.files)


def _require_input(folder: RunFolder, run: RunRecord, name: str) -> None:
    if not run.groups[parse_slice_name(name)[0]].num_rows:
        # A picture of the model alone.
        return
    try:
        folder.read_slice(name)
    except (StorageError, DataError) as error:
        raise DataError(
            f"slice {name} cannot be computed again, as its frozen input is damaged too: {error.what}",
            where=error.where,
            next_step="run the job's command with --new-run: the dataset is read again",
        ) from None


def _require_dataset(store: ObjectStore, run: RunRecord) -> None:
    """Refuse to take published results back that no command could publish again.

    The rows of a feature set are published one part at a time, and any later run adds those that are missing. A
    scoring that is open again is ended on its own version by its command; evaluations and inspections take the newest.
    """
    if run.verb == SCORE or adds_features(run):
        return
    name, frozen = run.identity["dataset"], run.identity["dataset_fingerprint"]
    current = open_dataset(store, name).fingerprint
    if current != frozen:
        raise DataError(
            f"no command would finish this run again: it is of version {frozen} of dataset '{name}', which has"
            f" version {current} now",
            where=f"runs/{run.run_id}",
            next_step="leave it, without its damaged slices, and run the job's command again for the new version",
        )


def _is_outdated(store: ObjectStore, run: RunRecord) -> bool:
    """Whether a run of features is of a version that its dataset has no more: `convoy cache` would refuse it."""
    name, frozen = dataset_of_run(run)
    if not adds_features(run) or name not in list_datasets(store):
        return False
    return open_dataset(store, name).fingerprint != frozen


def _is_of_some_rows(run: RunRecord) -> bool:
    """Whether a run of features is of some splits or rows, as an evaluation or an advice needs them.

    Open again, it would bar `convoy cache` of all rows, and commands that need others would not end it.
    """
    return adds_features(run) and (run.identity["splits"] != "all" or "rows" in run.identity)


def _is_gone_on_with(store: ObjectStore, run: RunRecord) -> bool:
    """Whether a command goes on with the run once it is open again."""
    return not (_is_outdated(store, run) or _is_of_some_rows(run))


def _require_free_pointer(store: ObjectStore, run: RunRecord) -> None:
    if not run.open_key:
        raise DataError(
            "no job's command would go on with this run: its record names no pointer",
            where=f"runs/{run.run_id}",
            next_step="run the job's command with --new-run",
        )
    others = [
        name for name, key in open_pointers(store).items() if key == run.open_key and name != run.run_id
    ]
    if others:
        raise _in_the_way(store, run)


def _open_again(store: ObjectStore, run: RunRecord) -> None:
    try:
        open_pointer(store, run.open_key, run.run_id)
    except PreconditionFailed:
        raise _in_the_way(store, run) from None


def _in_the_way(store: ObjectStore, run: RunRecord) -> ConfigError:
    return ConfigError(
        "another unfinished run of the same job is in the way",
        where=store.uri(run.open_key),
        next_step="finish it by its command, or give it up with `convoy runs cancel`; then repair again",
    )


def _keep_sound(
    folder: RunFolder, run: RunRecord, manifest: RunManifest, sound: tuple[SliceRecord, ...], token: int
) -> None:
    """Let each sound slice have its record, and sets of features only the rows of those."""
    store = folder.store
    recorded = {info.key for info in store.list_objects(folder.key("records/"))}
    for attempt in sound:
        if record_key(attempt) not in recorded:
            write_record(store, attempt)
    kept = manifest.model_copy(update={"slices": sound})
    for set_id, prefix in sorted(run.outputs.items()):
        if prefix.startswith(FEATURES):
            # Readers of the cache see the sound rows on, and miss the others.
            commit_set(store, set_id, kept)
    store.put(folder.key(f"repairs/manifest-{token}.json"), canonical_json(manifest))


def _report(
    store: ObjectStore,
    run: RunRecord,
    findings: _Findings,
    changes: Changes,
    obstacle: ConvoyError | None = None,
) -> RepairReport:
    damaged = [
        DamagedSlice(slice=attempt.slice, attempt=attempt.attempt, problem=problem)
        for attempt, problem in findings.damaged[:_MAX_LISTED]
    ]
    return RepairReport(
        run=run.run_id,
        verb=run.verb,
        changes=changes,
        slices=run.num_slices,
        num_damaged=len(findings.damaged),
        num_orphans=len(findings.orphans),
        orphan_bytes=sum(info.size_bytes for info in findings.orphans),
        retried_slices=len(findings.unfetched),
        retried_images=sum(attempt.unfetched for attempt in findings.unfetched),
        damaged=damaged,
        orphans=[info.key for info in findings.orphans[:_MAX_LISTED]],
        left_to_do=_left_to_do(store, run, findings, changes)
        if obstacle is None
        else f"{obstacle.what}: {obstacle.next_step}",
    )


def _left_to_do(store: ObjectStore, run: RunRecord, findings: _Findings, changes: Changes) -> str:
    if changes is Changes.SHOWN and (findings.set_aside or findings.orphans or findings.is_cut_off):
        option = " --retry-unfetched" if findings.unfetched else ""
        return f"convoy runs repair {run.run_id}{option} --apply"
    if not findings.set_aside and findings.manifest is not None:
        return "nothing"
    again = f"run the same convoy {run.verb} command again"
    if adds_features(run):
        if _is_outdated(store, run) or run.run_id not in open_pointers(store):
            again = "run the job that needs these features again, such as convoy cache, train or evaluate"
            return f"{again}: its new run computes the missing rows"
        again += ", or the job that needed these features"
    return f"{again}: it computes what is missing; then convoy verify {run.run_id}"
