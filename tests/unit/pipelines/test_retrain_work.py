"""The steps of a retraining, and the decision that follows from the last of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cache_jobs import write_digits
from convoy.core.config import parse_config
from convoy.core.progress import Silent
from convoy.core.splits import SplitOptions
from convoy.pipelines.retrain_config import Decision, RetrainConfig, StepResult
from convoy.pipelines.retrain_gate import GateConfig, ModelScores, judge
from convoy.pipelines.retrain_work import RetrainJob, take_until_settled
from convoy.report.curves import draw_learning_curves
from convoy.storage.datasets import freeze_dataset
from convoy.storage.local_store import LocalStore
from convoy.storage.registry import Alias, AliasMove, move_aliases
from convoy.storage.retrains import RetrainFolder, RetrainPlan

NAME = "digits"
CHAMPION = f"{NAME}@{'a' * 32}"
AGAIN = StepResult(
    step="refit_head", candidate=CHAMPION, train_rows=9, evidence=None, reason="the same", is_champion=True
)
OTHER = AGAIN.model_copy(update={"step": "fine_tune", "is_champion": False})


@pytest.fixture
def job(tmp_path: Path) -> RetrainJob:
    """A date of a model on a few digits."""
    write_digits(tmp_path / "images", 40)
    store = LocalStore(str(tmp_path / "workspace"))
    frozen = freeze_dataset(store, NAME, str(tmp_path / "images"), splits=SplitOptions(test_fraction=0.5))
    settings = {"name": NAME, "dataset": NAME, "backbone": {"arch": "lenet5", "weights": "random"}}
    plan = RetrainPlan(
        date="2026-01-01",
        fingerprint=frozen.header.fingerprint,
        previous_fingerprint=None,
        champion=None,
        config={},
    )
    return RetrainJob(
        store,
        RetrainFolder(store, NAME),
        parse_config(RetrainConfig, settings, where="test"),
        plan,
        progress=Silent(),
        draw_curves=draw_learning_curves,
    )


def right_scores(num_rows: int) -> ModelScores:
    """A model that is right about so many rows."""
    return ModelScores(
        labels_N=np.zeros(num_rows, np.int64),
        correct_N=np.ones(num_rows, np.bool_),
        found_N=np.ones(num_rows, np.bool_),
        ece=None,
        macs=1,
    )


def test_a_step_that_gives_the_champion_again_is_the_last_one() -> None:
    refused = AGAIN.model_copy(update={"is_champion": False})
    assert take_until_settled([AGAIN, OTHER]) == [AGAIN]
    assert take_until_settled([refused, OTHER]) == [refused, OTHER]


def test_what_a_person_took_back_is_promoted_by_nobody_else(job: RetrainJob) -> None:
    on_champion = right_scores(400), right_scores(0)
    evidence = judge(on_champion, on_champion, ("digit",), GateConfig(margin=0.1))
    passed = AGAIN.model_copy(update={"is_champion": False, "evidence": evidence})
    assert passed.passed

    def move(action: str, digest: str, run: str = "") -> None:
        entry = AliasMove(action=action, moves={Alias.CHAMPION: digest}, run=run, reason="a complaint")
        move_aliases(job._store, NAME, lambda _: entry)

    move("promoted", "a" * 32, run=f"retrains/{NAME}/2025-12-30")
    assert job._decide(passed, on_champion).decision is Decision.PROMOTED
    move("rolled_back", "b" * 32)
    outcome = job._decide(passed, on_champion)
    assert outcome.decision is Decision.HELD
    assert "a person took the champion back (a complaint)" in outcome.reason
    move("promoted", "a" * 32)
    assert job._decide(passed, on_champion).decision is Decision.PROMOTED


def test_a_first_holdout_that_is_too_small_for_the_gate_is_said_at_once(job: RetrainJob) -> None:
    (note,) = job._holdout_notes()
    assert "only a clear gain will be promoted" in note


def test_the_champion_made_again_is_nothing_new_and_no_refusal(job: RetrainJob) -> None:
    on_champion = right_scores(2), right_scores(0)
    outcome = job._decide(AGAIN, on_champion)
    assert (outcome.decision, outcome.candidate) == (Decision.NOTHING_NEW, None)
    assert job._decide(OTHER, on_champion).decision is Decision.HELD
