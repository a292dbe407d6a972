"""What a search would do is told before any of it is done."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from convoy.core.errors import ConfigError, DataError
from convoy.core.fingerprints import digest
from convoy.core.progress import Silent
from convoy.pipelines.tune import _Search
from convoy.pipelines.tune_config import SearchBudget
from convoy.pipelines.tune_dry_run import plan_tune
from convoy.storage.datasets import open_dataset
from convoy.storage.leases import hold_run
from convoy.storage.local_store import LocalStore
from convoy.storage.runs import OpenRun, run_ids
from made_searches import config_in, store_of_digits

WIDE = {"space": {"learning_rate": {"log_uniform": [0.001, 0.1]}}, "budget": {"trials": 200}}


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return store_of_digits(tmp_path)


def test_a_grid_is_told_whole_with_what_its_trials_take(store: LocalStore) -> None:
    plan = plan_tune(config_in(store, epochs=2))
    counts = open_dataset(store, "digits").counts
    assert {split: rows.num_samples for split, rows in counts.items() if split != "test"} == {
        "train": plan.num_train_rows,
        "val": plan.num_val_rows,
    }
    assert (plan.points, plan.max_trials, plan.trainings_a_trial) == (3, 3, 1)
    assert [trial.values for trial in plan.first_trials] == [{"recipe.seed": seed} for seed in range(3)]
    seconds = [trial.network_s for trial in plan.first_trials if trial.network_s is not None]
    assert len(seconds) == 3
    assert plan.network_s == pytest.approx(sum(seconds))
    longer = plan_tune(config_in(store, epochs=4)).network_s
    assert longer == pytest.approx(2 * sum(seconds))
    assert plan_tune(config_in(store, search={"folds": 5}, epochs=2)).network_s == pytest.approx(
        5 * sum(seconds)
    )
    assert run_ids(store) == []


def test_of_a_space_without_end_the_trials_that_will_be_drawn_first_are_told(store: LocalStore) -> None:
    config = config_in(store, search=WIDE)
    plan = plan_tune(config)
    assert (plan.points, plan.max_trials, plan.network_s) == (None, 200, None)
    drawn = list(islice(config.search_space.points(config.seed), 50))
    assert [trial.values for trial in plan.first_trials] == drawn
    by_time = plan_tune(config.model_copy(update={"budget": SearchBudget(hours=2)}))
    assert (by_time.max_trials, by_time.budget_s) == (None, 7200)


def test_what_optuna_will_choose_nobody_knows(store: LocalStore) -> None:
    plan = plan_tune(config_in(store, search={**WIDE, "search": "optuna"}))
    assert (plan.first_trials, plan.network_s, plan.max_trials) == ([], None, 200)


def test_a_trial_that_trains_on_features_has_no_forecast(store: LocalStore) -> None:
    plan = plan_tune(config_in(store, strategy="linear_probe", tap="f6"))
    assert {trial.network_s for trial in plan.first_trials} == {None}
    assert plan.network_s is None


def test_what_an_unfinished_search_has_done_is_told(store: LocalStore) -> None:
    config = config_in(store)
    folder = OpenRun(store, verb="tune", target=digest([config.name])).start()
    with hold_run(folder) as lease:
        search = _Search(store, open_dataset(store, "digits"), config, Silent(), folder, lease)
        search._journal.drawn(search._journal.point(0, {"recipe.seed": 0}))
        plan = plan_tune(config)
    assert (plan.unfinished_run, plan.ended_trials, plan.spent_s) == (folder.run_id, 0, 0)


def test_what_the_search_would_refuse_is_refused(store: LocalStore) -> None:
    with pytest.raises(DataError, match="photos"):
        plan_tune(config_in(store, distill={"teacher": "photos"}))
    whole = {"arch": "lenet5", "weights": "random", "preset": {"resize_px": None, "crop_px": 32}}
    with pytest.raises(ConfigError, match="keep no views of five"):
        plan_tune(config_in(store, search={"ensemble": {"crops": ["five"]}}, backbone=whole))
