"""What a date of a retraining is about: what counts as new, and what was held stays held until a person answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from cache_jobs import write_digits
from convoy.core.config import parse_config
from convoy.core.errors import ConfigError
from convoy.core.progress import Silent
from convoy.pipelines.retrain_config import Decision, NewData, RetrainConfig, RetrainReport
from convoy.pipelines.retrain_plan import plan_retrain, refuse_date, refuse_other_settings, settled_report
from convoy.storage.datasets import freeze_dataset, open_dataset
from convoy.storage.local_store import LocalStore
from convoy.storage.registry import Alias, AliasMove, move_aliases
from convoy.storage.retrains import RetrainFolder, RetrainPlan
from convoy.storage.runs import RunFolder, RunRecord

NAME = "digits"
FIRST, SECOND = "a" * 32, "b" * 32
NOTE = {"checks": {"when_labels_disagree": "note"}}


@dataclass(frozen=True, slots=True)
class Dates:
    """The dates of a model, a day each, with files that arrive and decisions that are put down."""

    folder: Path
    days: Iterator[int] = field(default_factory=lambda: count(1))
    files: Iterator[int] = field(default_factory=count)

    @property
    def store(self) -> LocalStore:
        return LocalStore(str(self.folder / "workspace"))

    @property
    def retrains(self) -> RetrainFolder:
        return RetrainFolder(self.store, NAME)

    def arrive(self) -> None:
        """One more digit comes in."""
        write_digits(self.folder / "images", 1, start=next(self.files))

    def plan(self, *, date: str | None = None, **settings: Any) -> RetrainPlan:
        """The next date begins."""
        config = self.config(date or f"2026-01-{next(self.days):02}", **settings)
        plan = plan_retrain(self.store, self.retrains, config, Silent())
        self.retrains.write_plan(plan)
        return plan

    def config(self, date: str, **settings: Any) -> RetrainConfig:
        given = {
            "name": NAME,
            "dataset": NAME,
            "source": str(self.folder / "images"),
            "date": date,
            "backbone": {"arch": "lenet5", "weights": "random"},
            **settings,
        }
        return parse_config(RetrainConfig, given, where="test")

    def settled(self, plan: RetrainPlan) -> RetrainReport | None:
        return settled_report(self.retrains, plan)

    def decide(
        self,
        plan: RetrainPlan,
        decision: Decision,
        *,
        candidate: str | None = None,
        objections: Sequence[str] = (),
    ) -> None:
        """Put a decision down, and promote its candidate where it says so."""
        if decision is Decision.PROMOTED:
            self.promote(candidate)
            champion = candidate
        else:
            champion = plan.champion
        report = RetrainReport(
            decision=decision,
            reason="as the test wants it",
            recomputed=1,
            date=plan.date,
            model=NAME,
            dataset_fingerprint=plan.fingerprint,
            candidate=None if candidate is None else f"{NAME}@{candidate}",
            champion=f"{NAME}@{champion}",
            data=NewData(
                rows=1,
                removed=0,
                usable=1,
                by_class={},
                new_classes=[],
                class_shift=0.0,
                embedding_shift=None,
                champion_top1=None,
                notes=[],
                objections=list(objections),
            ),
        )
        self.retrains.write_decision(plan.date, report.model_dump(mode="json"))

    def freeze(self) -> str:
        """The version of what is there now, as a person would freeze it."""
        freeze_dataset(self.store, NAME, str(self.folder / "images"), splits=self.config("2026-01-01").splits)
        return open_dataset(self.store, NAME).fingerprint

    def describe(self, digest: str, metrics: Mapping[str, Any]) -> None:
        """What the bundle of a digest says of itself."""
        self.store.put(f"models/{NAME}/{digest}/metrics.json", json.dumps(metrics).encode())

    def promote(self, digest: str | None) -> None:
        move = AliasMove(action="promoted", moves={Alias.CHAMPION: digest}, reason="a person says so")
        move_aliases(self.store, NAME, lambda _: move)


@pytest.fixture
def dates(tmp_path: Path) -> Dates:
    """The first date promoted a model."""
    dates = Dates(tmp_path)
    dates.arrive()
    dates.decide(dates.plan(), Decision.PROMOTED, candidate=FIRST)
    return dates


def held(dates: Dates, *, candidate: str | None = None, objections: Sequence[str] = ()) -> RetrainPlan:
    """A date with new data that is held."""
    dates.arrive()
    plan = dates.plan()
    dates.decide(plan, Decision.HELD, candidate=candidate, objections=objections)
    return plan


def test_rows_of_a_held_date_are_still_new_on_the_next(dates: Dates) -> None:
    first = dates.retrains.plan("2026-01-01")
    assert first is not None
    held(dates)
    dates.arrive()
    plan = dates.plan()
    assert plan.previous_fingerprint == first.fingerprint
    assert dates.settled(plan) is None


def test_a_source_below_the_home_is_found_there(dates: Dates, monkeypatch: pytest.MonkeyPatch) -> None:
    first = dates.retrains.plan("2026-01-01")
    assert first is not None
    monkeypatch.setenv("HOME", str(dates.folder))
    assert dates.plan(source="~/images").fingerprint == first.fingerprint


def test_a_dataset_that_was_renamed_is_refused_before_the_date_is_begun(dates: Dates) -> None:
    dates.arrive()
    with pytest.raises(ConfigError, match="'digits-v2' has no version") as caught:
        dates.plan(date="2026-02-01", dataset="digits-v2")
    assert "name the dataset as before" in caught.value.next_step
    assert dates.retrains.plan("2026-02-01") is None


def test_rows_that_arrive_before_a_promotion_add_up(dates: Dates) -> None:
    second = held(dates)
    assert dates.retrains.plan("2026-01-01") is not None
    dates.arrive()
    third = dates.plan()
    assert third.previous_fingerprint == second.previous_fingerprint
    dates.decide(third, Decision.PROMOTED, candidate=SECOND)
    dates.arrive()
    assert dates.plan().previous_fingerprint == third.fingerprint


def test_what_was_held_is_held_again_while_nothing_changes(dates: Dates) -> None:
    held(dates)
    for day in (3, 4):
        plan = dates.plan()
        report = dates.settled(plan)
        assert report is not None
        assert (report.decision, report.recomputed, report.date) == (Decision.HELD, 0, f"2026-01-{day:02}")
        assert report.process_exit_code == 5
        dates.retrains.write_decision(plan.date, report.model_dump(mode="json"))


def test_other_settings_ask_again_about_what_was_held_or_shadowed(dates: Dates) -> None:
    held(dates)
    shadow = dates.plan(mode="shadow")
    assert dates.settled(shadow) is None
    dates.decide(shadow, Decision.SHADOW, candidate=SECOND)
    nothing = dates.settled(dates.plan(mode="shadow"))
    assert nothing is not None
    assert nothing.decision is Decision.NOTHING_NEW
    assert dates.settled(dates.plan(**NOTE)) is None


def nothing_new(dates: Dates) -> None:
    """A date of a shadow without anything new is over, as the job ends it."""
    plan = dates.plan(mode="shadow")
    report = dates.settled(plan)
    assert report is not None
    assert report.decision is Decision.NOTHING_NEW
    dates.retrains.write_decision(plan.date, report.model_dump(mode="json"))


@pytest.mark.parametrize("decision", [Decision.SHADOW, Decision.NOTHING_NEW])
def test_other_settings_or_another_champion_ask_again_though_dates_without_news_lie_between(
    dates: Dates, decision: Decision
) -> None:
    dates.arrive()
    dates.decide(dates.plan(mode="shadow"), decision)
    nothing_new(dates)
    nothing_new(dates)
    assert dates.settled(dates.plan(mode="promote")) is None
    dates.promote(SECOND)
    assert dates.settled(dates.plan(mode="shadow")) is None


def test_a_person_who_promotes_a_held_candidate_has_answered(dates: Dates) -> None:
    plan = held(dates, candidate=SECOND)
    dates.promote(SECOND)
    answered = dates.plan()
    assert answered.previous_fingerprint == plan.fingerprint
    report = dates.settled(answered)
    assert report is not None
    assert (report.decision, report.champion) == (Decision.NOTHING_NEW, f"{NAME}@{SECOND}")


def test_a_champion_that_does_not_say_what_it_was_made_from_is_compared_with_what_was_not_held(
    dates: Dates,
) -> None:
    taken = open_dataset(dates.store, NAME).fingerprint
    held(dates)
    held(dates, objections=["wrong labels"])
    dates.promote(SECOND)
    asked = dates.plan()
    assert (asked.previous_fingerprint, asked.is_champions_version) == (taken, False)
    assert dates.settled(asked) is None


def test_a_champion_of_which_nothing_is_known_is_compared_from_the_second_date_on(tmp_path: Path) -> None:
    dates = Dates(tmp_path)
    dates.arrive()
    dates.promote(SECOND)
    dates.describe(SECOND, {"dataset_fingerprint": "0" * 32})
    first = dates.plan(mode="shadow")
    assert (first.previous_fingerprint, first.is_champions_version) == (None, False)
    dates.decide(first, Decision.SHADOW, candidate=FIRST)
    dates.arrive()
    assert dates.plan(mode="shadow").previous_fingerprint == first.fingerprint


def evaluated(dates: Dates, fingerprint: str) -> str:
    """The run that measured a model on a version of the dataset."""
    record = RunRecord.new(
        "r1",
        verb="evaluate",
        identity={"dataset_fingerprint": fingerprint},
        config={},
        outputs={},
        groups=(),
    )
    RunFolder(dates.store, record.run_id).write_record(record)
    return record.run_id


@pytest.mark.parametrize("kind", ["says it", "single", "ensemble"])
def test_what_a_person_trained_on_a_held_version_and_promoted_was_made_from_that(
    dates: Dates, kind: str
) -> None:
    plan = held(dates, objections=["half of the rows are gone"])
    run = evaluated(dates, plan.fingerprint)
    metrics = {
        "says it": {"dataset_fingerprint": plan.fingerprint},
        "single": {"run": run},
        "ensemble": {"evaluation": {"run": run}},
    }
    dates.describe(SECOND, metrics[kind])
    dates.promote(SECOND)
    answered = dates.plan()
    assert (answered.previous_fingerprint, answered.is_champions_version) == (plan.fingerprint, True)
    report = dates.settled(answered)
    assert report is not None
    assert report.decision is Decision.NOTHING_NEW
    dates.retrains.write_decision(answered.date, report.model_dump(mode="json"))
    dates.arrive()
    assert dates.plan().previous_fingerprint == plan.fingerprint


def test_a_shadow_of_a_champion_on_its_own_version_is_asked_again_where_it_may_promote(
    tmp_path: Path,
) -> None:
    dates = Dates(tmp_path)
    dates.arrive()
    dates.describe(SECOND, {"dataset_fingerprint": dates.freeze()})
    dates.promote(SECOND)
    plan = dates.plan(mode="shadow")
    assert (plan.previous_fingerprint, dates.settled(plan)) == (plan.fingerprint, None)
    dates.decide(plan, Decision.SHADOW, candidate=FIRST)
    nothing_new(dates)
    assert dates.settled(dates.plan(mode="promote")) is None


def test_bad_files_that_are_taken_away_leave_nothing_new(dates: Dates) -> None:
    held(dates)
    sorted((dates.folder / "images").rglob("*.jpg"), key=lambda path: path.name)[-1].unlink()
    report = dates.settled(dates.plan())
    assert report is not None
    assert report.decision is Decision.NOTHING_NEW


def test_a_date_before_a_decided_one_is_refused(dates: Dates) -> None:
    with pytest.raises(ConfigError, match="2026-01-01 was decided already"):
        refuse_date(dates.retrains, "2025-12-31")


def test_a_date_to_come_is_refused_for_it_would_end_all_earlier_ones(dates: Dates) -> None:
    today = datetime.now(UTC).date()
    refuse_date(dates.retrains, today.isoformat())
    with pytest.raises(ConfigError, match="is not there yet"):
        refuse_date(dates.retrains, (today + timedelta(days=2)).isoformat())


def test_a_date_that_was_begun_is_not_trained_for_by_other_settings(dates: Dates) -> None:
    plan = dates.plan(fine_tune={"epochs": 1})
    refuse_other_settings(plan, dates.config(plan.date, fine_tune={"epochs": 1}))
    with pytest.raises(ConfigError, match="begun with other settings"):
        refuse_other_settings(plan, dates.config(plan.date, fine_tune={"epochs": 2}))


def test_versions_that_were_objected_to_are_kept_in_mind_until_a_promotion(dates: Dates) -> None:
    plans = [held(dates, objections=["wrong labels"]) for _ in range(2)]
    gated = held(dates)
    plan = dates.plan()
    assert plan.held == {one.date: one.fingerprint for one in plans}
    assert gated.fingerprint not in plan.held.values()
    dates.decide(plan, Decision.PROMOTED, candidate=SECOND)
    assert dates.plan().held == {}


def test_a_version_that_is_objected_to_twice_is_that_of_its_first_date(dates: Dates) -> None:
    first = held(dates, objections=["wrong labels"])
    again = dates.plan()
    dates.decide(again, Decision.HELD, objections=["wrong labels"])
    assert dates.plan().held == {first.date: first.fingerprint}


def test_a_date_freezes_no_other_source_in_the_place_of_the_dataset(dates: Dates) -> None:
    dates.arrive()
    plan = dates.plan()
    write_digits(dates.folder / "others", 3)
    with pytest.raises(ConfigError, match="made otherwise:\n  source: was"):
        dates.plan(source=str(dates.folder / "others"))
    assert dates.plan().fingerprint == plan.fingerprint
