"""The documents of a search's trials in its run folder: the search's whole memory."""

from __future__ import annotations

import io
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from convoy.cluster.search_plan import GivenUp, PastTrial, TrialPoint
from convoy.core.config import StrictModel
from convoy.core.crash_points import CrashPoint, crash_point
from convoy.core.errors import ConfigError, PreconditionFailed
from convoy.core.fingerprints import canonical_json, digest
from convoy.core.search_space import Values
from convoy.core.statistics import Interval
from convoy.core.trial_events import TrialState, TrialStatus
from convoy.pipelines.folds import fold_name
from convoy.pipelines.train import TrainReport
from convoy.pipelines.train_config import TrainConfig
from convoy.pipelines.tune_config import TuneConfig
from convoy.storage.documents import ModelT, read_model
from convoy.storage.object_store import ObjectStore, put_looking_first
from convoy.storage.runs import RunFolder

_PLAIN_FIELDS = {
    "trial",
    "index",
    "state",
    "reason",
    "top1",
    "nll",
    "bundles",
    "train_run",
    "predictions_runs",
    "rejects",
    "within_error_budget",
}
_TRIALS_SCHEMA = pa.schema(
    [
        pa.field("trial", pa.string(), nullable=False),
        pa.field("index", pa.int32(), nullable=False),
        pa.field("state", pa.string(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("values", pa.string(), nullable=False),
        pa.field("config", pa.string(), nullable=False),
        pa.field("top1", pa.float64()),
        pa.field("nll", pa.float64()),
        pa.field("bundles", pa.list_(pa.string()), nullable=False),
        pa.field("train_run", pa.string()),
        pa.field("predictions_runs", pa.list_(pa.string()), nullable=False),
        pa.field("rejects", pa.int64(), nullable=False),
        pa.field("within_error_budget", pa.bool_(), nullable=False),
        pa.field("parameters", pa.int64()),
        pa.field("macs", pa.int64()),
        pa.field("size_bytes", pa.int64()),
        pa.field("num_views", pa.int32()),
        pa.field("images_per_s", pa.float64()),
        pa.field("cluster_share", pa.float64()),
        pa.field("network_share", pa.float64()),
        pa.field("seconds", pa.float64(), nullable=False),
    ]
)
_DRAWN = "drawn/"
_TRAINED = "trained/"
_TRIALS = "trials/"
_CUT_SHORT = "cut_short/"


class TrialCost(StrictModel):
    """What a trial's network costs, or its networks of all folds together.

    `macs` are multiply-adds of one pass, `size_bytes` those of the weights. `images_per_s` was measured while the
    validation rows were predicted, with `num_views` passes an image, by a `cluster_share` of all GPUs, or else CPUs; a
    `network_share` of that time was in networks. The rest an image takes once, whatever becomes of it then: to be
    fetched, decoded, and written about.
    """

    parameters: int
    macs: int
    size_bytes: int
    num_views: int
    images_per_s: float | None
    # Trials that were recorded without shares count as timed by the whole cluster, with all time in networks.
    cluster_share: float = 1.0
    network_share: float = 1.0

    @property
    def seconds_per_pass(self) -> float | None:
        """What a pass takes with the whole cluster at work, scaled from its share; None where nothing was measured."""
        seconds = self._seconds_per_image
        return None if seconds is None else seconds * self.network_share / self.num_views

    @property
    def seconds_once(self) -> float:
        """What an image takes beside its passes, likewise; 0 where nothing was measured."""
        return (self._seconds_per_image or 0.0) * (1 - self.network_share)

    @property
    def _seconds_per_image(self) -> float | None:
        return None if self.images_per_s is None else self.cluster_share / self.images_per_s


class TrialRecord(StrictModel):
    """`trials/<trial>.json`: written once, as the last thing that a trial does. A trial that has one never runs again.

    `config` is the training as `convoy train` takes it, empty where what was drawn makes none. `top1` and `nll` are of
    the validation rows: those of the whole evaluation for a finished trial, else the last epoch's. `epochs` are numbers
    of epochs and their validation top-1. Each of `predictions_runs` holds the validation logits of the bundle at its
    place, for every view. With folds there is a bundle for each, its validation rows are its fold, `top1` is of all
    training rows, and `epochs` are those of the first fold. `rejects` are validation images that could not be
    predicted; `within_error_budget` counts those of the training too.
    """

    trial: str
    index: int
    values: dict[str, Any]
    config: dict[str, Any]
    state: TrialState
    reason: str | None = None
    details: str | None = None
    top1: float | None = None
    top1_interval: Interval | None = None
    nll: float | None = None
    epochs: tuple[tuple[int, float], ...] = ()
    bundles: tuple[str, ...] = ()
    train_run: str | None = None
    predictions_runs: tuple[str, ...] = ()
    rejects: int = 0
    within_error_budget: bool = True
    cost: TrialCost | None = None
    started_unix_s: float
    finished_unix_s: float

    @property
    def point(self) -> TrialPoint:
        """What was drawn."""
        return TrialPoint(trial=self.trial, index=self.index, values=self.values)

    @property
    def status(self) -> TrialStatus:
        """The trial for people who watch the search."""
        return TrialStatus(
            trial=self.trial,
            state=self.state,
            values=self.values,
            epoch=self.epochs[-1][0] if self.epochs else None,
            top1=self.top1,
            images_per_s=self.cost.images_per_s if self.cost else None,
            seconds=self.finished_unix_s - self.started_unix_s,
            reason=self.reason,
        )

    @property
    def past(self) -> PastTrial:
        """The trial for a search that goes on."""
        return PastTrial(point=self.point, state=self.state, top1=self.top1, epochs=self.epochs)


class TrialSummary(StrictModel):
    """A trial in the report of its search; `trials/<trial>.json` in the run folder says more."""

    trial: str
    state: TrialState
    values: dict[str, Any]
    top1: float | None
    top1_interval: Interval | None
    nll: float | None
    num_epochs: int
    seconds: float
    bundles: list[str]
    predictions_runs: list[str]
    rejects: int = 0
    within_error_budget: bool = True
    cost: TrialCost | None
    reason: str | None

    @classmethod
    def of(cls, record: TrialRecord) -> TrialSummary:
        """What of a record belongs into the report."""
        shared = record.model_dump(include=cls.model_fields.keys() & TrialRecord.model_fields.keys())
        seconds = record.finished_unix_s - record.started_unix_s
        return cls(**shared, num_epochs=len(record.epochs), seconds=seconds)


class TrialJournal:
    """The points that were drawn, and the records of the trials that ended, below a run folder."""

    def __init__(self, folder: RunFolder, config: TuneConfig) -> None:
        self._folder = folder
        self._store: ObjectStore = folder.store
        self._config = config

    def point(self, index: int, values: Values) -> TrialPoint:
        """The trial of a point. No trial of another search has its name, so it joins nobody else's training."""
        name = digest([self._folder.run_id, index, values])[:6]
        return TrialPoint(trial=f"{index:03d}-{name}", index=index, values=values)

    def train_config(self, point: TrialPoint) -> TrainConfig:
        """The training of a trial; ConfigError where what was drawn makes none."""
        return self._config.trial_config(point.values, name=self._training_name(point.trial))

    def trainings(self, trial: str) -> list[str]:
        """The names of the trainings of a trial: one, or one a fold."""
        name, folds = self._training_name(trial), self._config.folds
        return [name] if folds is None else [fold_name(name, index) for index in range(folds)]

    def recorded_config(self, point: TrialPoint) -> dict[str, Any]:
        """The training as the record of a trial holds it; empty where what was drawn makes none."""
        try:
            return self.train_config(point).model_dump(mode="json")
        except ConfigError:
            # Not all draws are checked before the search: such a trial fails, and must not take the others with it.
            return {}

    def drawn(self, point: TrialPoint) -> None:
        """Remember a trial before it starts."""
        self._put_once(f"{_DRAWN}{point.trial}.json", canonical_json(point))
        crash_point(CrashPoint.TRIAL_DRAWN)

    def trained(self, point: TrialPoint) -> TrainReport | None:
        """What an earlier attempt at a trial has trained, or None."""
        return read_model(TrainReport, self._store, self._key(f"{_TRAINED}{point.trial}.json"))

    def keep_trained(self, point: TrialPoint, report: TrainReport) -> None:
        """Keep what a trial has trained, so that no other attempt at it trains again."""
        self._put_once(f"{_TRAINED}{point.trial}.json", canonical_json(report))

    def ended(self, point: TrialPoint) -> TrialStatus | None:
        """How a trial ended, or None while it has no record."""
        record = self.record(point.trial)
        return None if record is None else record.status

    def give_up(self, point: TrialPoint, end: GivenUp) -> None:
        """Record a trial that was stopped or lost."""
        self.write(self._given_up(point, end))

    def cut_short(self, point: TrialPoint, end: GivenUp) -> TrialRecord:
        """Note how far a trial came that the end of the budget cut short: with a larger one it goes on."""
        record = self._given_up(point, end)
        self._store.put(self._key(f"{_CUT_SHORT}{point.trial}.json"), canonical_json(record))
        return record

    def _given_up(self, point: TrialPoint, end: GivenUp) -> TrialRecord:
        now_unix_s = time.time()
        return TrialRecord(
            trial=point.trial,
            index=point.index,
            values=point.values,
            config=self.recorded_config(point),
            state=end.state,
            reason=end.reason,
            top1=end.epochs[-1][1] if end.epochs else None,
            epochs=end.epochs,
            started_unix_s=now_unix_s - end.seconds,
            finished_unix_s=now_unix_s,
        )

    def record(self, trial: str) -> TrialRecord | None:
        """The record of a trial that ended, or None."""
        return read_model(TrialRecord, self._store, self._key(f"{_TRIALS}{trial}.json"))

    def write(self, record: TrialRecord) -> TrialRecord:
        """Record a trial, and return the record that counts: an earlier attempt's where that came first."""
        self._put_once(f"{_TRIALS}{record.trial}.json", canonical_json(record))
        crash_point(CrashPoint.TRIAL_RECORDED)
        return self.record(record.trial) or record

    def records(self) -> list[TrialRecord]:
        """All trials that ended, in the order in which they were drawn."""
        return in_order(self._documents(TrialRecord, _TRIALS))

    def all_records(self) -> list[TrialRecord]:
        """`records`, and what is noted of trials that were cut short and have not gone on to their end since."""
        ended = self.records()
        return in_order([*ended, *self.noted(self.waiting(ended))])

    def noted(self, waiting: Iterable[TrialPoint]) -> list[TrialRecord]:
        """What is noted of trials that were cut short, of those that are waiting."""
        names = {point.trial for point in waiting}
        return [record for record in self._documents(TrialRecord, _CUT_SHORT) if record.trial in names]

    def waiting(self, records: Iterable[TrialRecord]) -> list[TrialPoint]:
        """Trials that were drawn and are not among the records."""
        ended = {record.trial for record in records}
        points = [point for point in self._documents(TrialPoint, _DRAWN) if point.trial not in ended]
        return sorted(points, key=lambda point: point.index)

    def _training_name(self, trial: str) -> str:
        return f"{self._config.name}-{trial}"

    def _documents(self, model: type[ModelT], prefix: str) -> list[ModelT]:
        keys = [info.key for info in self._store.list_objects(self._key(prefix))]
        found = (read_model(model, self._store, key) for key in keys)
        return [document for document in found if document is not None]

    def _put_once(self, name: str, data: bytes) -> None:
        # Another attempt of the same trial may have been first; then its document stays.
        with suppress(PreconditionFailed):
            put_looking_first(self._store, self._key(name), data)

    def _key(self, name: str) -> str:
        return self._folder.key(name)


def in_order(records: Iterable[TrialRecord]) -> list[TrialRecord]:
    """The records in the order in which their trials were drawn."""
    return sorted(records, key=lambda record: record.index)


def trials_parquet(records: Sequence[TrialRecord]) -> bytes:
    """The trials as a table of plain types, one row each, for notebooks; what was drawn is JSON in `values`."""
    rows = [
        {
            **record.model_dump(mode="json", include=_PLAIN_FIELDS),
            "values": canonical_json(record.values).decode(),
            "config": canonical_json(record.config).decode(),
            "seconds": record.finished_unix_s - record.started_unix_s,
            **(record.cost.model_dump() if record.cost else dict.fromkeys(TrialCost.model_fields)),
        }
        for record in records
    ]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=_TRIALS_SCHEMA), buffer, compression="zstd")
    return buffer.getvalue()
