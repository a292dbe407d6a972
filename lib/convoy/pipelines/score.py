"""`convoy score`: manifest − finished slices → one decode, all members and crops → parts → commit → reconcile."""

from __future__ import annotations

import time
from typing import Any

from pydantic import ValidationError

from convoy.core.config import StrictModel
from convoy.core.crop_policies import EvaluationMode
from convoy.core.errors import ConfigError, DataError, StorageError
from convoy.core.fingerprints import canonical_json, digest
from convoy.core.progress import Progress
from convoy.core.result_columns import ClassOutputs, PartitionBy
from convoy.pipelines.committee_predictions import (
    BegunRun,
    CommitteeJob,
    CommitteePredictions,
    require_gate,
)
from convoy.pipelines.committees import CommitteeRecord
from convoy.pipelines.feature_plan import ExtractionConfig, PrecisionChoice
from convoy.pipelines.feature_summary import timings
from convoy.pipelines.forecast import Actual, Forecast, actual_of, nothing_left
from convoy.pipelines.forecast_sampling import forecast_scoring
from convoy.pipelines.model_choice import chosen_committee
from convoy.pipelines.prediction_request import SCORE, PredictionRequest, ScoreRequest
from convoy.pipelines.score_config import ScoreConfig
from convoy.pipelines.verify import count_problems
from convoy.pipelines.workspace import open_workspace
from convoy.storage.commits import RunManifest
from convoy.storage.documents import read_model
from convoy.storage.manifests import Manifest
from convoy.storage.object_store import ObjectStore
from convoy.storage.predictions import PREDICTIONS
from convoy.storage.runs import OpenRun, RunFolder, RunRecord
from convoy.storage.scores import require_short_labels

FORECASTS = "forecasts/"


class ScoreReport(StrictModel):
    """Every input row of a scoring ended once: `results + rejects == inputs`.

    Of the rejects `unfetched` could not be fetched, which a later run may. `recomputed` samples were scored by this
    call, the others by earlier ones. `predictions` is the glob of the
    parquet parts, `reject_parts` that of the rejected rows. `images_per_s` is the steady rate of this call, from the
    start of its first slice to the end of its last, or that of the run where nothing was left to do; `first_row_s` is
    when its first batch was through the network, `seconds` sums over workers. `forecast` is that of an earlier
    dry run, `actual` what came of it.
    """

    run: str
    dataset: str
    fingerprint: str
    model_digest: str
    inputs: int
    results: int
    rejects: int
    unfetched: int = 0
    recomputed: int
    reject_codes: dict[str, int]
    flags: dict[str, int]
    predictions: str
    reject_parts: str
    images_per_s: float
    first_row_s: float | None
    job_s: float
    seconds: dict[str, float]
    forecast: Forecast | None
    actual: Actual
    notes: list[str]
    within_error_budget: bool


def run_score(config: ScoreConfig, *, progress: Progress, new_run: bool = False) -> ScoreReport:
    """Score every row of the dataset that has no score yet, and prove that none was lost or doubled.

    Raises DataError where there is no row.
    """
    started_unix_s = time.time()
    store, manifest, request, notes = _open_request(config, progress, new_run=new_run)
    job = CommitteeJob(store, manifest, request)

    def report(found: CommitteePredictions) -> ScoreReport:
        told = _report(store, manifest, config, request, found, started_unix_s)
        return told.model_copy(update={"notes": [*notes, *told.notes]})

    def describe(found: CommitteePredictions) -> dict[str, Any]:
        return report(found).model_dump(mode="json")

    settings = config.model_dump(mode="json")
    return report(job.ensure(progress=progress, config=settings, new_run=new_run, describe=describe))


def plan_score(config: ScoreConfig, *, progress: Progress, new_run: bool = False) -> Forecast:
    """What `run_score` would take, from the scores of a sample, which are thrown away; kept for the run's record.

    Of a run that is there already, only what is left of it.
    """
    store, manifest, request, notes = _open_request(config, progress, new_run=new_run)
    job = CommitteeJob(store, manifest, request)
    begun = job.begun(new_run=new_run)
    if begun is None and not new_run and job.is_barred():
        notes = [
            *notes,
            f"an unfinished run of the name '{config.run_name}' has other inputs or settings: the scoring itself needs"
            " another --name, or --new-run to leave that one",
        ]
    if begun is not None and begun.done:
        notes = [*notes, _done_note(begun)]
    if begun is not None and not begun.slices_left:
        return nothing_left(notes)
    forecast = forecast_scoring(
        store, manifest, request, prices=config.prices, progress=progress, begun=begun
    )
    if begun is None:
        # For the record of the run that begins next, and so only where it is of all images.
        store.put(_forecast_key(manifest, request), canonical_json(forecast))
    return forecast.model_copy(update={"notes": [*notes, *forecast.notes]})


def _done_note(begun: BegunRun) -> str:
    run_id, num_slices = begun.record.run_id, begun.record.num_slices
    if begun.is_finished:
        return f"nothing is left: every row was scored already, by run {run_id}; --new-run scores them anew"
    if not begun.slices_left:
        return f"nothing is left: all slices of run {run_id} are done, and the same command commits them"
    return (
        f"{len(begun.done)} of {num_slices} slices of run {run_id} are done: the forecast is of what is left"
    )


def _open_request(
    config: ScoreConfig, progress: Progress, *, new_run: bool = False
) -> tuple[ObjectStore, Manifest, PredictionRequest, list[str]]:
    store = open_workspace(config.workspace, config.writers)
    open_run = OpenRun(store, verb=SCORE, target=config.run_name)
    manifest, notes = config.open_for(store, open_run, progress=progress, new_run=new_run, every_file=True)
    references, model_notes = config.references_for(store, open_run, new_run=new_run)
    committee = chosen_committee(store, config.naming(references), config, config.extraction)
    _require_features(config, len(committee.members))
    _require_probabilities(config, committee)
    if config.mode is EvaluationMode.GATED:
        require_gate(committee)
    request = PredictionRequest(
        committee=committee,
        dataset=config.dataset_name,
        splits=config.splits,
        extraction=config.extraction,
        mode=config.mode,
        scores=ScoreRequest(
            name=config.run_name,
            columns=config.columns,
            partition_by=config.partition_by,
            references=references,
        ),
    ).settled(store)
    if not request.num_rows(manifest):
        raise DataError(
            "there is no image to score",
            where=f"splits of {request.dataset}",
            next_step=f"choose splits that have some: {', '.join(manifest.counts)}",
        )
    if config.partition_by is PartitionBy.LABEL:
        require_short_labels(manifest.classes)
    notes = [*notes, *model_notes, *_kept_by_bundles(config.extraction, committee)]
    return store, manifest, request.with_forecast(_foretold(store, _forecast_key(manifest, request))), notes


def _foretold(store: ObjectStore, key: str) -> dict[str, Any] | None:
    """What a dry run foretold, for the record of the run; None where none did, or as another Convoy writes it."""
    try:
        forecast = read_model(Forecast, store, key)
    except DataError:
        return None
    return None if forecast is None else forecast.model_dump(mode="json")


def _forecast_of(record: RunRecord) -> Forecast | None:
    """The forecast in the record of a run, if this Convoy understands it: no run shall fail at its end for that."""
    told = record.settings.get("forecast")
    try:
        return None if told is None else Forecast.model_validate(told)
    except ValidationError:
        return None


def _forecast_key(manifest: Manifest, request: PredictionRequest) -> str:
    return f"{FORECASTS}{digest(request.identity(manifest))}.json"


def _require_features(config: ScoreConfig, num_members: int) -> None:
    """Raise ConfigError where a column of features is asked for that nothing gives."""
    if config.columns.features is None:
        return
    if num_members > 1:
        raise ConfigError(
            f"{num_members} networks have no features in common",
            where="columns.features",
            next_step="score with one of them, or cache each one's features with convoy cache",
        )
    if config.mode is EvaluationMode.GATED:
        raise ConfigError(
            "behind a gate not every image is seen whole, so features would differ from row to row",
            where="columns.features",
            next_step="score in mode exact",
        )


def _require_probabilities(config: ScoreConfig, committee: CommitteeRecord) -> None:
    """Raise ConfigError where a column of probabilities is asked for of models that have none."""
    if config.columns.outputs is ClassOutputs.PROBABILITIES and not committee.gives_probabilities:
        raise ConfigError(
            "what a linear SVM says of classes are margins, no probabilities",
            where="columns.outputs",
            next_step="set columns.outputs=logits, or score with a head of kind softmax",
        )


def _kept_by_bundles(extraction: ExtractionConfig, committee: CommitteeRecord) -> list[str]:
    """A note of what is set and changes nothing of bundles: they see images as they did when they were trained."""
    bundles = [member.classifier for member in committee.members if member.bundle is not None]
    kept = []
    if "decode" in extraction.model_fields_set and any(
        one.decode_rule != extraction.decode for one in bundles
    ):
        kept.append("extraction.decode")
    if extraction.precision is not PrecisionChoice.AUTO and any(
        one.precision is not extraction.precision for one in bundles
    ):
        kept.append("extraction.precision")
    return [f"without effect on bundles, which keep their own: {', '.join(kept)}"] if kept else []


def _report(
    store: ObjectStore,
    manifest: Manifest,
    config: ScoreConfig,
    request: PredictionRequest,
    found: CommitteePredictions,
    started_unix_s: float,
) -> ScoreReport:
    folder, published = RunFolder(store, found.run_id), found.manifest
    record = folder.record()
    assert record is not None, "a published run has a record"
    _reconcile(folder, record, published, num_wanted=request.num_rows(manifest))
    levels = "" if config.partition_by is PartitionBy.NONE else "*/"
    measured = timings(found.finished or published.slices, started_unix_s)
    forecast = _forecast_of(record)
    prices = config.prices
    if "prices" not in config.model_fields_set and forecast is not None and forecast.prices is not None:
        prices = forecast.prices
    return ScoreReport(
        run=found.run_id,
        dataset=config.dataset_name,
        fingerprint=manifest.fingerprint,
        model_digest=request.committee.digest,
        inputs=record.num_inputs,
        results=published.num_results,
        rejects=published.num_rejects,
        recomputed=sum(one.num_results + one.num_rejects for one in found.finished),
        unfetched=found.unfetched,
        reject_codes=found.reject_codes,
        flags=found.flags,
        predictions=store.uri(folder.key(f"{PREDICTIONS}/{levels}*.parquet")),
        reject_parts=store.uri(folder.key("rejects/*.parquet")),
        images_per_s=measured["images_per_s"],
        first_row_s=measured["first_row_s"] if found.finished else None,
        job_s=time.time() - started_unix_s,
        seconds=measured["seconds"],
        forecast=forecast,
        actual=actual_of(published, prices),
        notes=[
            record.settings["compile_reason"] if found.finished else "every row was scored already",
            *found.fetch_notes(),
        ],
        within_error_budget=config.error_budget.allows(published.num_rejects, record.num_inputs),
    )


def _reconcile(folder: RunFolder, record: RunRecord, manifest: RunManifest, *, num_wanted: int) -> None:
    """Raise StorageError unless all rows of the dataset that were wanted are accounted for, each slice once.

    `verify` proves it row by row.
    """
    problem = next(count_problems(record, manifest), None)
    if record.num_inputs != num_wanted:
        problem = f"{record.num_inputs} inputs were frozen of {num_wanted} rows of the dataset"
    if problem is not None:
        raise StorageError(
            problem,
            where=folder.prefix,
            next_step=f"look at it with convoy verify {folder.run_id}, and mend it with convoy runs repair",
        )
