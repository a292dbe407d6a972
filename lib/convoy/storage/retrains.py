"""Retrainings of a model: a folder for each logical date, a lease for all of them, and the frozen holdout.

    retrains/<model>/lease.json, holdout.parquet, holdout-<date>.parquet
    retrains/<model>/<date>/plan.json, work.json, fine_tuned.json, decision.json

A date with a decision is finished for good. A plan says which version of the dataset and which champion its date
began with, so that a killed retraining goes on with the same, and with the network that it fine-tuned.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from convoy.core.config import StrictModel
from convoy.core.crash_points import CrashPoint, crash_point
from convoy.core.errors import LeaseHeld, PreconditionFailed
from convoy.core.fingerprints import canonical_json
from convoy.storage.documents import exists, read_json, read_model
from convoy.storage.leases import RunLease, hold_run
from convoy.storage.object_store import ObjectStore, put_looking_first
from convoy.storage.runs import RunFolder

HOLDOUT_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("content_id", pa.binary(16), nullable=False),
        # The class as it was when the row was frozen: later labels do not count.
        pa.field("class", pa.string(), nullable=False),
    ]
)
# Behind the date.
_DECISION = "/decision.json"


class RetrainPlan(StrictModel):
    """`plan.json`: what a date began with. `champion` is a digest.

    `previous_fingerprint` is of the version that the champion was made from: what is not in it is new. Where that is
    not known (`is_champions_version`), it is of the last date that was not held. `held` are the versions
    whose new data was objected to since then, by their dates.
    """

    date: str
    fingerprint: str
    previous_fingerprint: str | None
    is_champions_version: bool = True
    champion: str | None
    held: dict[str, str] = Field(default_factory=dict)
    config: dict[str, Any]


class RetrainWork(StrictModel):
    """`work.json`: rows whose features this date had to compute, by the id of the feature set."""

    missing: dict[str, int] = Field(default_factory=dict)


class RetrainFolder(RunFolder):
    """The keys of a model's retrainings, with a lease like a run's."""

    def __init__(self, store: ObjectStore, name: str) -> None:
        super().__init__(store, f"retrain-{name}")
        self.name = name
        self.prefix = f"retrains/{name}/"

    def decided_dates(self) -> list[str]:
        """The dates that have a decision, oldest first."""
        keys = (found.key.removeprefix(self.prefix) for found in self.store.list_objects(self.prefix))
        return [key.removesuffix(_DECISION) for key in keys if key.endswith(_DECISION)]

    def decision(self, date: str) -> dict[str, Any] | None:
        """The report of a finished date, or None."""
        found: dict[str, Any] | None = read_json(self.store, self.key(f"{date}{_DECISION}"))
        return found

    def write_decision(self, date: str, report: dict[str, Any]) -> None:
        """Finish a date for good; whoever decided it first stays."""
        try:
            put_looking_first(self.store, self.key(f"{date}{_DECISION}"), canonical_json(report))
        except PreconditionFailed:
            return
        crash_point(CrashPoint.RETRAIN_DECIDED)

    def plan(self, date: str) -> RetrainPlan | None:
        """What a date began with, or None if it has not begun."""
        return read_model(RetrainPlan, self.store, self.key(f"{date}/plan.json"))

    def write_plan(self, plan: RetrainPlan) -> None:
        """Begin a date."""
        self.store.put(self.key(f"{plan.date}/plan.json"), canonical_json(plan))
        crash_point(CrashPoint.RETRAIN_PLANNED)

    def work(self, date: str) -> RetrainWork:
        """What a date had to compute so far, restarts included."""
        return read_model(RetrainWork, self.store, self.key(f"{date}/work.json")) or RetrainWork()

    def note_missing(self, date: str, set_id: str, num_rows: int) -> None:
        """Note what is missing in a set, before it is computed; the first note of a date counts."""
        work = self.work(date)
        if set_id not in work.missing:
            missing = {**work.missing, set_id: num_rows}
            self.store.put(self.key(f"{date}/work.json"), canonical_json(RetrainWork(missing=missing)))

    def fine_tuned(self, date: str) -> dict[str, Any] | None:
        """The report of the network that a date has trained, or None."""
        found: dict[str, Any] | None = read_json(self.store, self.key(f"{date}/fine_tuned.json"))
        return found

    def keep_fine_tuned(self, date: str, report: dict[str, Any]) -> None:
        """Keep what a date has trained, so that no later attempt at it trains again; whoever was first stays."""
        with suppress(PreconditionFailed):
            put_looking_first(self.store, self.key(f"{date}/fine_tuned.json"), canonical_json(report))

    def holdout(self) -> pa.Table | None:
        """The frozen holdout and all that joined it, columns of HOLDOUT_SCHEMA, or None before the first retraining."""
        keys = [found.key for found in self.store.list_objects(self.key("holdout"))]
        return pa.concat_tables([self.store.open_parquet(key).read() for key in keys]) if keys else None

    def joined_holdout(self, date: str) -> pa.Table | None:
        """The rows that joined the holdout on a date, or None."""
        key = self.key(_joined_name(date))
        return self.store.open_parquet(key).read() if exists(self.store, key) else None

    def freeze_holdout(self, rows: pa.Table) -> None:
        """Freeze rows as the holdout, unless one is frozen already."""
        self._freeze("holdout.parquet", rows)

    def extend_holdout(self, date: str, rows: pa.Table) -> None:
        """Freeze rows that join the holdout on a date, unless others did."""
        self._freeze(_joined_name(date), rows)

    def _freeze(self, name: str, rows: pa.Table) -> None:
        buffer = io.BytesIO()
        pq.write_table(rows.cast(HOLDOUT_SCHEMA), buffer, compression="zstd")
        with suppress(PreconditionFailed):
            put_looking_first(self.store, self.key(name), buffer.getvalue())


def _joined_name(date: str) -> str:
    return f"holdout-{date}.parquet"


@contextmanager
def hold_retrain(folder: RetrainFolder) -> Iterator[RunLease]:
    """Be the only one that retrains a model; LeaseHeld, naming the holder, where another one is at it."""
    try:
        with hold_run(folder) as lease:
            yield lease
    except LeaseHeld as held:
        raise LeaseHeld(
            held.what.replace("this run", f"the retraining of '{folder.name}'"),
            where=held.where,
            next_step="wait for it, then run the same command again: a date that it decided is not done twice",
            **held.fields,
        ) from None
