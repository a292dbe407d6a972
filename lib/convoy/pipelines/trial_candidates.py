"""Which trials of a search are candidates for its ensemble."""

from __future__ import annotations

from collections.abc import Sequence

from convoy.core.errors import ConfigError, DataError
from convoy.core.trial_events import TrialState
from convoy.pipelines.ensemble_candidates import Candidate
from convoy.pipelines.feature_plan import forward_s
from convoy.pipelines.train_config import PROBES, TrainConfig
from convoy.pipelines.trial_journal import TrialRecord
from convoy.storage.bundles import peek_bundle, resolve_bundle
from convoy.storage.object_store import ObjectStore
from convoy.vision.decode_rule import DecodeRule
from convoy.vision.head_config import HeadKind


def candidate_trials(
    store: ObjectStore, records: Sequence[TrialRecord]
) -> tuple[list[TrialRecord], list[str]]:
    """The finished trials that can vote with the best of them, the first of each model, and notes on the others.

    Raises ConfigError where none gives probabilities.
    """
    finished = [record for record in records if record.state is TrialState.FINISHED]
    probable = [record for record in finished if not _gives_margins(record)]
    notes = []
    if len(probable) < len(finished):
        notes.append(
            f"{len(finished) - len(probable)} trials with a linear SVM cannot be members: margins are no probabilities"
        )
    if not probable:
        raise ConfigError(
            "every finished trial has a linear SVM for a head: its margins cannot be averaged with others",
            where="space",
            next_step="search among softmax or mlp heads too, and add --new-run",
        )
    first_of: dict[tuple[str, ...], TrialRecord] = {}
    for record in probable:
        first = first_of.setdefault(_model(store, record), record)
        if first is not record:
            notes.append(f"trial {record.trial} is the same model as {first.trial}")
    models = list(first_of.values())
    best = max(models, key=lambda record: record.top1 or 0.0)
    ballots = {record.trial: _ballot(store, record) for record in models}
    joining = [record for record in models if ballots[record.trial] == ballots[best.trial]]
    if len(joining) < len(models):
        notes.append(
            f"{len(models) - len(joining)} trials cannot be members beside the best, {best.trial}: they know"
            " other classes, or decode images by another rule"
        )
    return joining, notes


def reject_notes(
    records: Sequence[TrialRecord], candidates: Sequence[TrialRecord], num_val_rows: int | None
) -> list[str]:
    """Which trials broke their error budget, and how many rows chose among the candidates where some lost any."""
    broke = [record.trial for record in records if not record.within_error_budget]
    lost = [f"{record.trial} lost {record.rejects:,}" for record in candidates if record.rejects]
    notes = []
    if broke:
        notes.append(f"trials that rejected more images than error_budget allows: {', '.join(broke)}")
    if lost and num_val_rows is not None:
        notes.append(
            f"{num_val_rows:,} validation rows chose, those that every candidate predicted: {', '.join(lost)}"
        )
    return notes


def view_notes(candidates: Sequence[TrialRecord]) -> list[str]:
    """Which candidates kept fewer views than others, as an ensemble has the crops that all of them kept."""
    views = {record.trial: record.cost.num_views for record in candidates if record.cost is not None}
    fewest, most = min(views.values(), default=0), max(views.values(), default=0)
    if fewest == most:
        return []
    limiting = ", ".join(trial for trial, num_views in views.items() if num_views == fewest)
    return [
        f"the ensemble has no more crops than {limiting} kept: {fewest} views an image, where others kept up to"
        f" {most}; name one policy for all with `crops`, or search without it"
    ]


def as_candidate(record: TrialRecord) -> Candidate:
    """A finished trial as its ensemble takes it; DataError for the record of another."""
    if not record.bundles or len(record.bundles) != len(record.predictions_runs) or record.cost is None:
        raise DataError(
            "the record is not that of a finished trial",
            where=f"trials/{record.trial}.json",
            next_step="delete it, and run the same command again",
        )
    measured = record.cost.seconds_per_pass
    (bundle, run), *others = zip(record.bundles, record.predictions_runs, strict=True)
    return Candidate(
        bundle=bundle,
        predictions_run=run,
        # Without a measured rate the forecast must do.
        seconds_per_pass=forward_s(record.cost.macs) if measured is None else measured,
        seconds_once=record.cost.seconds_once,
        other_folds=tuple(others),
    )


def _gives_margins(record: TrialRecord) -> bool:
    config = TrainConfig.model_validate(record.config)
    return config.strategy in PROBES and config.head.kind is HeadKind.LINEAR_SVM


def _model(store: ObjectStore, record: TrialRecord) -> tuple[str, ...]:
    """The digests of its bundles. Trials that differ in what their strategy does not use have the same."""
    return tuple(resolve_bundle(store, bundle).digest for bundle, _ in as_candidate(record).parts)


def _ballot(store: ObjectStore, record: TrialRecord) -> tuple[frozenset[str], DecodeRule]:
    """What members must have in common: their classes, and how they decode an image."""
    bundle = peek_bundle(store, resolve_bundle(store, as_candidate(record).bundle))
    decode = TrainConfig.model_validate(record.config).extraction.decode
    return frozenset(bundle.read_json("classes.json")), decode
