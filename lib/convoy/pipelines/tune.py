"""`convoy tune`: search space → trials → validation predictions → the best ensemble → its worth on test."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from convoy.cluster.nodes import alive_nodes
from convoy.cluster.search_plan import GivenUp, SearchPlan
from convoy.cluster.session import ray_session
from convoy.cluster.tuning import plan_trials, run_search
from convoy.core.errors import ConfigError, TrainingError
from convoy.core.fingerprints import canonical_json, digest
from convoy.core.progress import Progress
from convoy.core.trial_events import TrialState
from convoy.pipelines.dataset_choice import open_as_begun
from convoy.pipelines.ensemble_building import EnsembleReport, ReportDrawer, build_ensemble
from convoy.pipelines.ensemble_choice import EnsembleSettings
from convoy.pipelines.ensemble_gate import gate_notes
from convoy.pipelines.ingest_choice import FUSED_NOTE, settle_ingest
from convoy.pipelines.network_training import CurveDrawer
from convoy.pipelines.search_identity import as_recorded, search_identity
from convoy.pipelines.search_time import SearchTimer, seconds_spent
from convoy.pipelines.trial_candidates import as_candidate, candidate_trials, reject_notes, view_notes
from convoy.pipelines.trial_journal import TrialJournal, TrialRecord, TrialSummary, in_order, trials_parquet
from convoy.pipelines.trial_trainings import give_up_trainings
from convoy.pipelines.trials import TrialJob, run_trial
from convoy.pipelines.tune_config import SearchBudget, TuneConfig
from convoy.pipelines.tune_plan import (
    SearchPins,
    check_budget,
    check_crops,
    code_digests,
    copied_weights,
    fetch_networks,
    most_batch_bytes,
    moved_names,
    pin_names,
    require_validation_rows,
)
from convoy.pipelines.workspace import open_workspace
from convoy.storage.commits import finish
from convoy.storage.leases import RunLease, WhenHeld, give_up, hold_run, take_up
from convoy.storage.manifests import Manifest
from convoy.storage.object_store import ObjectStore
from convoy.storage.runs import OpenRun, RunFolder, RunRecord, finished_run, refuse_changed_identity

_VERB = "tune"
_RAY_TUNE = "ray_tune"
_PAGE = "ensemble.html"
# A search that is done is found again through `searches/<digest of what is searched>.json`.
_ANSWERS = "searches/"
_NEVER_RAN = GivenUp(
    state=TrialState.STOPPED, reason="the budget was used up before it came to run", epochs=(), seconds=0
)

TrialDrawer = Callable[[Sequence[TrialRecord]], bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneDrawers:
    """What makes the pictures: of a training's curves, of the space, and of the curves of all trials."""

    training: CurveDrawer
    space: TrialDrawer
    trials: TrialDrawer
    ensemble: ReportDrawer


class TuneReport(EnsembleReport):
    """The ensemble of a search's trials, and the trials. `page` is its report as one HTML file.

    `settings` are those of this ensemble, `budget` is what the search had in all; the run's record has those of the
    call that began it. `within_error_budget` holds where it does for each trial and for the rows of `evaluation`.
    """

    settings: EnsembleSettings
    budget: SearchBudget
    run: str
    trials: list[TrialSummary]
    page: str
    notes: list[str]
    within_error_budget: bool = True


def run_tune(
    config: TuneConfig, *, progress: Progress, draw: TuneDrawers, new_run: bool = False
) -> TuneReport:
    """Search, and build the ensemble of the trials; the same call again goes on where it was killed.

    It goes on with the version of the dataset on which it began, and says so where there is a newer one.
    A trial that ended never runs again, whether the search was finished or not: another `ensemble` is built of the
    same trials, and with a larger budget there may be more. A finished one whose teacher or file of weights is another
    now does not count, which a note says. Raises ConfigError for a
    dataset without labelled validation rows and for a budget that cannot suffice, what `pin_names` raises,
    TrainingError where no trial finished, LeaseHeld where another driver is at work on the same search.
    """
    store = open_workspace(config.workspace, config.writers)
    open_run = OpenRun(store, verb=_VERB, target=digest([config.name]))
    manifest, notes = open_as_begun(store, open_run, config.dataset, new_run=new_run)
    if config.folds is None:
        require_validation_rows(manifest)
    identity = search_identity(manifest, config)
    answer_key = f"{_ANSWERS}{digest(identity)}.json"
    folder, moved = _begun_folder(open_run, identity, manifest, config, answer_key, new_run=new_run)
    folder = folder or open_run.start()
    with hold_run(folder, when_held=WhenHeld.REFUSE) as lease:
        known = _report(folder)
        if known is not None and (known.settings, known.budget) == (config.ensemble, config.budget):
            progress.stage("the search was done already")
            return known
        record = folder.record()
        if record is None:
            progress.stage("bringing the networks into the workspace")
            record = _record(folder, identity, config, pin_names(store, manifest, config))
        refuse_changed_identity(record, as_recorded(identity, record))
        pins = SearchPins.model_validate(record.settings)
        search = _Search(store, manifest, config, progress, folder, lease)
        with ray_session():
            is_over = known is not None and known.budget == config.budget
            with _given_up_before_a_trial(search, open_run, folder, lease):
                records = search.records() if is_over else search.run(draw.training, pins)
            ensemble = search.build_ensemble(records)
        report = TuneReport(
            **ensemble.model_dump(),
            settings=config.ensemble,
            budget=config.budget,
            run=folder.run_id,
            trials=[TrialSummary.of(record) for record in records],
            page=store.uri(folder.key(_PAGE)),
            notes=[*pins.notes, *search.notes],
            within_error_budget=search.is_within_error_budget(records, ensemble),
        )
        search.draw(report, draw, records)
        # Before the marker, without which it does not count.
        store.put(answer_key, canonical_json({"run_id": folder.run_id}))
        finish(folder, report.model_dump(mode="json"))
        open_run.close(folder)
    return report.model_copy(update={"notes": [*notes, *moved, *report.notes]})


def _begun_folder(
    open_run: OpenRun,
    identity: dict[str, Any],
    manifest: Manifest,
    config: TuneConfig,
    answer_key: str,
    *,
    new_run: bool,
) -> tuple[RunFolder | None, list[str]]:
    """The unfinished search, or the finished one that counts; None for a new one, with notes on what counts no more."""
    begun = open_run.current()
    folder, _ = take_up(
        open_run, as_recorded(identity, None if begun is None else begun.record()), new_run=new_run
    )
    if folder is not None or open_run.begins_anew(new_run):
        return folder, []
    folder = finished_run(manifest.store, answer_key)
    if folder is not None and (moved := _moved_since(folder, manifest, config)):
        return None, [f"a new search, as since {folder.run_id} {', '.join(moved)}"]
    return folder, []


@contextmanager
def _given_up_before_a_trial(
    search: _Search, open_run: OpenRun, folder: RunFolder, lease: RunLease
) -> Iterator[None]:
    """Give a search up that a ConfigError ends before it has drawn anything.

    Of a budget that is too small, or the like: the config that corrects it may be another search.
    """
    try:
        yield
    except ConfigError:
        if not search.has_drawn():
            lease.confirm()
            open_run.close(folder)
            give_up(folder)
        raise


def _report(folder: RunFolder) -> TuneReport | None:
    """What a finished search found, maybe by a driver that was at work until now."""
    stored = folder.report()
    return None if stored is None else TuneReport.model_validate(stored)


def _moved_since(folder: RunFolder, manifest: Manifest, config: TuneConfig) -> list[str]:
    """What the names of a finished search mean otherwise now; with another budget it goes on with what they meant."""
    known, record = _report(folder), folder.record()
    if known is None or record is None or known.budget != config.budget:
        return []
    return moved_names(folder.store, manifest, config, SearchPins.model_validate(record.settings))


def _record(folder: RunFolder, identity: dict[str, Any], config: TuneConfig, pins: SearchPins) -> RunRecord:
    record = RunRecord.new(
        folder.run_id,
        verb=_VERB,
        identity=json.loads(canonical_json(identity)),
        config=config.model_dump(mode="json"),
        outputs={},
        groups=(),
        settings=pins.model_dump(mode="json"),
    )
    return folder.write_record(record)


class _Search:
    """One search in its run folder, which this driver holds."""

    def __init__(
        self,
        store: ObjectStore,
        manifest: Manifest,
        config: TuneConfig,
        progress: Progress,
        folder: RunFolder,
        lease: RunLease,
    ) -> None:
        self._store, self._manifest, self._config, self._progress = store, manifest, config, progress
        self._folder, self._lease = folder, lease
        self._journal = TrialJournal(folder, config)
        self.notes: list[str] = []

    def run(self, draw_curves: CurveDrawer, pins: SearchPins) -> list[TrialRecord]:
        """All trials, ended; TrainingError if none finished."""
        config, progress, store = self._config, self._progress, self._store
        progress.stage("planning the search")
        examples = fetch_networks(store, self._manifest, config, pins.weights)
        check_crops(config, examples)
        wanted = next(config.examples()).workers
        options = settle_ingest(wanted, self._manifest)
        share = plan_trials(
            options,
            None if config.max_concurrent == "auto" else config.max_concurrent,
            batch_bytes=most_batch_bytes(examples, options.num_workers or 1),
        )
        if options.ingest is not wanted.ingest and share.workers.on_gpus:
            self.notes.append(FUSED_NOTE)
        check_budget(config, examples, self._manifest, alive_nodes())
        job = TrialJob(
            workspace=store.root_uri,
            run_id=self._folder.run_id,
            dataset_fingerprint=self._manifest.fingerprint,
            config=config,
            share=share,
            weights={network: store.uri(key) for network, key in copied_weights(examples).items()},
            teachers=pins.teachers,
            code_digests=code_digests(config),
            precision=pins.precision,
        )
        plan = self._plan(share.max_concurrent)
        progress.stage("trials")
        cut_short: dict[str, GivenUp] = {}
        if plan.time_s is None or plan.time_s > 0:
            timer = SearchTimer(self._folder, self._lease.token)

            def check() -> None:
                self._lease.check()
                timer.tick()

            trial = partial(run_trial, job, draw_curves)
            cut_short = run_search(plan, trial, self._journal, progress.trials, check)
            timer.keep()
        # Before trials that another driver may be running are given up.
        self._lease.confirm()
        self._forget_ray_tune()
        return self._ended(cut_short)

    def has_drawn(self) -> bool:
        """Whether there is any trial yet."""
        return bool(self._journal.waiting(()))

    def records(self) -> list[TrialRecord]:
        """Those of all trials so far."""
        return self._journal.all_records()

    def build_ensemble(self, records: Sequence[TrialRecord]) -> EnsembleReport:
        """The ensemble of the trials that finished."""
        extraction = next(self._config.examples()).extraction
        trials, notes = candidate_trials(self._store, records)
        self.notes += notes
        report = build_ensemble(
            self._store,
            self._manifest,
            [as_candidate(record) for record in trials],
            self._config.ensemble,
            name=self._config.name,
            dataset=self._config.dataset,
            extraction=extraction,
            progress=self._progress,
        )
        self.notes += [*view_notes(trials), *reject_notes(records, trials, report.num_val_rows)]
        if report.gate is not None:
            self.notes += gate_notes(report.gate, report.num_val_rows or 0)
        return report

    def is_within_error_budget(self, records: Sequence[TrialRecord], ensemble: EnsembleReport) -> bool:
        """Whether no trial rejected more images than it may, nor the evaluation of the ensemble."""
        allowed, evaluation = next(self._config.examples()).error_budget, ensemble.evaluation
        return all(record.within_error_budget for record in records) and (
            evaluation is None or allowed.allows(evaluation.rejects, evaluation.samples)
        )

    def draw(self, report: TuneReport, draw: TuneDrawers, records: Sequence[TrialRecord]) -> None:
        """Write the pictures, the page and the table of trials."""
        folder = self._folder
        self._lease.confirm()
        self._store.put(folder.key("parallel_coordinates.png"), draw.space(records))
        self._store.put(folder.key("learning_curves.png"), draw.trials(records))
        self._store.put(folder.key("trials.parquet"), trials_parquet(records))
        self._store.put(folder.key(_PAGE), draw.ensemble(report))

    def _plan(self, max_concurrent: int) -> SearchPlan:
        config, records = self._config, self._journal.records()
        allowed_s = config.budget.seconds
        return SearchPlan(
            name=self._folder.run_id,
            kind=config.search,
            space=config.search_space,
            seed=config.seed,
            scheduler=config.scheduler,
            max_concurrent=max_concurrent,
            max_trials=config.budget.trials,
            time_s=None if allowed_s is None else allowed_s - seconds_spent(self._folder),
            past=tuple(record.past for record in records),
            waiting=tuple(self._journal.waiting(records)),
            storage_uri=self._store.uri(self._folder.key(_RAY_TUNE)),
        )

    def _ended(self, cut_short: Mapping[str, GivenUp]) -> list[TrialRecord]:
        """The records of all trials. Those that the end of the budget cut short go on with a larger one.

        Trainings of trials that ended and did not finish are given up: no command goes on with them.
        """
        ended = self._journal.records()
        waiting = self._journal.waiting(ended)
        noted = {record.trial: record for record in self._journal.noted(waiting)}
        for point in waiting:
            if point.trial in cut_short or point.trial not in noted:
                noted[point.trial] = self._journal.cut_short(point, cut_short.get(point.trial, _NEVER_RAN))
        lost = [record.trial for record in ended if record.state is not TrialState.FINISHED]
        give_up_trainings(self._store, [name for trial in lost for name in self._journal.trainings(trial)])
        records = in_order([*ended, *noted.values()])
        if len(lost) < len(ended):
            return records
        first = next((record for record in records if record.reason), None)
        goes_on = len(ended) < len(records)
        raise TrainingError(
            f"none of {len(records)} trials finished"
            + (f"; the first: {first.reason}" if first else "")
            + _against_budget(records, self._config.budget),
            where=self._store.uri(self._folder.key("trials/")),
            next_step="raise the budget, and run the same command again: what was cut short goes on"
            if goes_on
            else "correct the space, and add --new-run",
        )

    def _forget_ray_tune(self) -> None:
        """Delete what Ray Tune wrote: pickles, which nobody shall ever read back."""
        keys = [info.key for info in self._store.list_objects(self._folder.key(f"{_RAY_TUNE}/"))]
        self._store.delete(keys)


def _against_budget(records: Sequence[TrialRecord], budget: SearchBudget) -> str:
    """How far the longest trial came, beside the time that there was for all."""
    if budget.seconds is None or not records:
        return ""
    longest = max(map(TrialSummary.of, records), key=lambda trial: trial.seconds)
    return (
        f"; the budget was {budget.seconds:,.0f} s in all, and the longest trial, {longest.trial}, ran for"
        f" {longest.seconds:,.0f} s; epochs done: {longest.num_epochs}"
    )
