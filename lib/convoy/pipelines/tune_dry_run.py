"""`convoy tune --dry-run`: which trials a search would run, how many, and what they take, without starting a worker."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import islice
from typing import Any

from pydantic import Field

from convoy.cluster.search_plan import SearchKind
from convoy.core.config import StrictModel
from convoy.core.errors import ConfigError
from convoy.core.fingerprints import digest
from convoy.core.records import Split
from convoy.core.search_space import Values
from convoy.pipelines.backbone_record import BackboneRecord
from convoy.pipelines.dataset_choice import open_as_begun
from convoy.pipelines.models import fetch_backbone
from convoy.pipelines.search_time import seconds_spent
from convoy.pipelines.train import first_network
from convoy.pipelines.train_config import TrainConfig
from convoy.pipelines.trial_journal import TrialJournal
from convoy.pipelines.tune_config import TuneConfig
from convoy.pipelines.tune_plan import (
    Example,
    least_training_s,
    require_validation_rows,
    resolve_names,
)
from convoy.pipelines.workspace import open_workspace
from convoy.storage.manifests import Manifest
from convoy.storage.object_store import ObjectStore
from convoy.storage.runs import OpenRun

_SHOWN_TRIALS = 50
_A_TRIAL = "dry-run"


class PlannedTrial(StrictModel):
    """A point as it will be drawn: `network_s` are the least seconds of its training in the network, on two cores.

    Null where features are trained on, or a part of a network, which nothing forecasts. `problem` is why it will fail.
    """

    index: int
    values: dict[str, Any]
    network_s: float | None
    problem: str | None = None


class TunePlan(StrictModel):
    """The resolved config and what a search would do.

    `points` are those of the space, null where it has no end; `max_trials` is where the space or the budget ends, each
    of `trainings_a_trial` trainings. `first_trials` are the first 50 in order; none under `optuna`, which chooses each
    by what came of those before. `network_s` are the least seconds of all trials on two cores, null where one has no
    forecast or not all are known. `ended_trials` and `spent_s` are those of the unfinished run that the command goes on
    with.
    """

    config: TuneConfig
    num_train_rows: int
    num_val_rows: int
    points: int | None
    max_trials: int | None
    trainings_a_trial: int
    first_trials: list[PlannedTrial]
    network_s: float | None
    budget_s: float | None
    unfinished_run: str | None
    ended_trials: int
    spent_s: float
    notes: list[str] = Field(default_factory=list)


def plan_tune(config: TuneConfig) -> TunePlan:
    """What `run_tune` would do; only networks are brought into the workspace that are not there.

    Raises what the search itself would raise before it starts a worker.
    """
    store = open_workspace(config.workspace, config.writers)
    open_run = OpenRun(store, verb="tune", target=digest([config.name]))
    manifest, notes = open_as_begun(store, open_run, config.dataset)
    if config.folds is None:
        require_validation_rows(manifest)
    resolve_names(store, manifest, config)
    points = config.search_space.num_points
    max_trials = min(points, math.inf if config.max_trials is None else config.max_trials)
    trials = [] if config.search is SearchKind.OPTUNA else _first_trials(store, manifest, config, max_trials)
    trainings = config.folds or 1
    known = [trial.network_s for trial in trials if trial.network_s is not None]
    is_whole = len(known) == max_trials
    folder = open_run.unfinished()
    return TunePlan(
        config=config,
        num_train_rows=manifest.counts[Split.TRAIN].num_samples,
        num_val_rows=manifest.counts[Split.VAL].num_samples if Split.VAL in manifest.counts else 0,
        points=None if math.isinf(points) else int(points),
        max_trials=None if math.isinf(max_trials) else int(max_trials),
        trainings_a_trial=trainings,
        first_trials=trials,
        network_s=trainings * sum(known) if is_whole else None,
        budget_s=config.budget.seconds,
        unfinished_run=folder.run_id if folder else None,
        ended_trials=len(TrialJournal(folder, config).records()) if folder else 0,
        spent_s=seconds_spent(folder) if folder else 0.0,
        notes=notes,
    )


def _first_trials(
    store: ObjectStore, manifest: Manifest, config: TuneConfig, max_trials: float
) -> list[PlannedTrial]:
    points = islice(config.search_space.points(config.seed), int(min(max_trials, _SHOWN_TRIALS)))
    networks: dict[str, BackboneRecord] = {}

    def network_of(training: TrainConfig) -> BackboneRecord:
        wanted = first_network(training, manifest)
        name = digest(wanted)
        if name not in networks:
            networks[name] = fetch_backbone(store, wanted)
        return networks[name]

    return [_planned(manifest, config, network_of, index, values) for index, values in enumerate(points)]


def _planned(
    manifest: Manifest,
    config: TuneConfig,
    network_of: Callable[[TrainConfig], BackboneRecord],
    index: int,
    values: Values,
) -> PlannedTrial:
    try:
        training = config.trial_config(values, name=f"{config.name}-{_A_TRIAL}")
    except ConfigError as error:
        return PlannedTrial(index=index, values=dict(values), network_s=None, problem=str(error))
    example = Example(training=training, network=network_of(training))
    network_s = least_training_s(example, manifest)
    return PlannedTrial(index=index, values=dict(values), network_s=network_s or None)
