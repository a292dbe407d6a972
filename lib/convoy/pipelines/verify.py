"""`convoy verify`: prove a finished run again, from storage alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa
from pydantic import Field

from convoy.core.config import StrictModel
from convoy.core.errors import ChecksumMismatch, ConfigError, DataError, StorageError
from convoy.core.fingerprints import MultisetDigest, digest_bytes
from convoy.core.records import Split
from convoy.pipelines.data_origin import dataset_of_run
from convoy.pipelines.runs_state import RunState, run_status
from convoy.storage.commits import (
    FEATURES,
    PartFile,
    RunManifest,
    SliceRecord,
    read_commits,
    read_manifest,
    stray_files,
)
from convoy.storage.datasets import open_dataset
from convoy.storage.manifests import Manifest
from convoy.storage.object_store import ObjectStore
from convoy.storage.parquet_files import open_parquet_file
from convoy.storage.runs import RunFolder, RunRecord, open_pointers, require_run

_MAX_PROBLEMS = 20
# The verb whose slices write pictures: files without rows.
_PICTURES = "inspect"


class VerifyReport(StrictModel):
    """Whether every input row of a run ended exactly once, in results or rejects, and all files are intact.

    Of an evaluation or a scoring of whole splits the input is compared with the dataset, too; `notes` say where that
    could not be done. What a run of features was not given, the next one adds.
    Files of other attempts are a problem as well: who reads the parts by a glob has their rows twice.
    `rows_digest` covers all result rows and does not depend on order, slices, attempts or kills.
    """

    run: str
    verb: str
    inputs: int
    results: int
    rejects: int
    rows_digest: str
    ok: bool
    problems: list[str]
    notes: list[str] = Field(default_factory=list)


def verify_run(store: ObjectStore, run_id: str) -> VerifyReport:
    """Re-read every file of a run and compare ids, row counts and checksums with what was promised.

    Reads the dataset's ids as well, in bounded memory.
    """
    folder, run = require_run(store, run_id)
    manifest = read_manifest(folder)
    if manifest is None and not run.groups:
        raise ConfigError(
            f"a run of convoy {run.verb} has no rows of results that could be proven",
            where=folder.prefix,
            next_step="verify the run of its evaluation, which its report names; bundles are verified when opened",
        )
    if manifest is None:
        raise _not_finished(folder)
    problems: list[str] = []
    if not folder.is_finished():
        problems.append("the run has no _SUCCESS marker: run the job's command again to finish it")
    dataset, notes = _dataset_of(store, run)
    for problem in _problems(folder, run, manifest, dataset):
        problems.append(problem)
        if len(problems) >= _MAX_PROBLEMS:
            problems.append("more problems were left out")
            break
    return VerifyReport(
        run=run_id,
        verb=run.verb,
        inputs=run.num_inputs,
        results=manifest.num_results,
        rejects=manifest.num_rejects,
        rows_digest=manifest.rows_digest(),
        ok=not problems,
        problems=problems,
        notes=notes,
    )


def _not_finished(folder: RunFolder) -> DataError:
    state = run_status(folder, open_pointers(folder.store)).state
    next_step = "run the job's command again to finish it"
    if state is RunState.FINISHED:
        next_step = f"a repair of it was cut off: end that with `convoy runs repair {folder.run_id} --apply`"
    if state in (RunState.GIVEN_UP, RunState.LEFT_BEHIND):
        next_step = (
            f"no command goes on with it, as it is {state}: look for a newer one with `convoy runs list`"
        )
    return DataError(
        "the run is not finished: it has no manifest yet", where=folder.prefix, next_step=next_step
    )


def adds_features(run: RunRecord) -> bool:
    """Whether a run's results are rows of feature sets."""
    return all(prefix.startswith(FEATURES) for prefix in run.outputs.values())


def _dataset_of(store: ObjectStore, run: RunRecord) -> tuple[Manifest | None, list[str]]:
    """The dataset of which the run's input is whole splits, or None, with a note where it is there no more."""
    name, fingerprint = dataset_of_run(run)
    has_some_rows = run.identity.get("rows") is not None or adds_features(run) or run.verb == _PICTURES
    if has_some_rows or not (name and fingerprint):
        return None, []
    try:
        return open_dataset(store, name, fingerprint), []
    except DataError as error:
        return None, [f"the input could not be compared with its dataset: {error.what}"]


def _problems(
    folder: RunFolder, run: RunRecord, manifest: RunManifest, dataset: Manifest | None
) -> Iterator[str]:
    yield from count_problems(run, manifest)
    inputs = MultisetDigest()
    for record in manifest.slices:
        yield from slice_problems(folder, run, record, inputs)
    if dataset is not None and inputs.hexdigest() != _dataset_digest(dataset, run.identity["splits"]):
        version = f"version {dataset.fingerprint} of the dataset"
        yield f"the ids of the run's {run.num_inputs} inputs are not those of {version}"
    yield from _commit_problems(folder.store, run, manifest)
    for info in stray_files(folder, run, manifest.slices):
        yield (
            f"{info.key}: the run does not name this file, but who reads the whole folder does:"
            f" remove it with convoy runs repair {run.run_id}"
        )


def count_problems(run: RunRecord, manifest: RunManifest) -> Iterator[str]:
    """What a manifest alone shows to be wrong: slices or rows that are missing or too many."""
    promised = list(run.slice_names())
    published = [record.slice for record in manifest.slices]
    if promised != published:
        yield f"{len(promised)} slices were planned, {len(published)} published, or in another order"
    if manifest.num_results + manifest.num_rejects != run.num_inputs:
        yield f"{manifest.num_results} results and {manifest.num_rejects} rejects for {run.num_inputs} inputs"


def _dataset_digest(dataset: Manifest, splits: Sequence[str]) -> str:
    """The digest of the ids of some splits of a dataset, or of "all"."""
    chosen = None if splits == "all" else [Split(split) for split in splits]
    ids = MultisetDigest()
    for batch in dataset.iter_batches(("sample_id",), splits=chosen):
        _add_ids(ids, batch["sample_id"].to_pylist())
    return ids.hexdigest()


def _add_ids(digest: MultisetDigest, ids: Iterable[str]) -> None:
    for sample_id in ids:
        digest.add_row(sample_id.encode())


def slice_problems(
    folder: RunFolder, run: RunRecord, record: SliceRecord, inputs: MultisetDigest | None = None
) -> Iterator[str]:
    """What is wrong with one attempt of a slice: with its files, or with the frozen input behind them.

    The ids of that are added to `inputs`.
    """
    if run.verb == _PICTURES:
        yield from _file_problems(folder, record)
        return
    try:
        wanted = folder.read_slice(record.slice)["sample_id"].to_pylist()
        if inputs is not None:
            _add_ids(inputs, wanted)
        rejected = _ids(folder.store, record.rejects) if record.rejects else []
        if set(record.parts) != set(run.outputs_of(record.slice)):
            yield f"slice {record.slice}: has parts of other outputs than planned"
        for part in record.parts.values():
            found = _ids(folder.store, part)
            if sorted(found + rejected) != sorted(wanted):
                yield f"{part.key}: its ids and the slice's rejects are not the slice's {len(wanted)} inputs"
    except (StorageError, DataError) as error:
        yield f"slice {record.slice}: {error}"


def _file_problems(folder: RunFolder, record: SliceRecord) -> Iterator[str]:
    """What is wrong with files that hold no rows."""
    for part in record.files:
        try:
            _written_bytes(folder.store, part)
        except StorageError as error:
            yield f"slice {record.slice}: {error}"


def _ids(store: ObjectStore, part: PartFile) -> list[str]:
    """The sample ids of a file whose bytes are those that were recorded."""
    data = _written_bytes(store, part)
    file = open_parquet_file(pa.BufferReader(data), where=part.key)
    ids: list[str] = file.read(columns=["sample_id"])["sample_id"].to_pylist()
    if len(ids) != part.num_rows:
        raise ChecksumMismatch(f"{len(ids)} rows where {part.num_rows} were recorded", where=part.key)
    return ids


def _written_bytes(store: ObjectStore, part: PartFile) -> bytes:
    data = store.get(part.key).data
    if digest_bytes(data).hex() != part.checksum:
        raise ChecksumMismatch("the bytes are not those that were written", where=part.key)
    return data


def _commit_problems(store: ObjectStore, run: RunRecord, manifest: RunManifest) -> Iterator[str]:
    for set_id, prefix in run.outputs.items():
        if not prefix.startswith(FEATURES):
            continue
        wanted = [record.parts[set_id].key for record in manifest.slices if set_id in record.parts]
        listed = [
            part.key
            for commit in read_commits(store, set_id)
            if commit.run_id == run.run_id
            for part in commit.parts
        ]
        if wanted != listed:
            yield f"{FEATURES}{set_id}/commits/{run.run_id}.json lists other parts than the run's manifest"
