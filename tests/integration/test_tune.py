"""`convoy tune` on a real Ray: what trials leave, failures, early stopping, and kills in the middle of a search."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image

from chaos_jobs import wait_for
from command_lines import TIMEOUT_S, convoy_here, convoy_json_here, last_json, settings_arguments
from convoy.core.crash_points import CrashPoint
from convoy.pipelines.runs_list import list_runs
from convoy.storage.commits import read_manifest
from convoy.storage.member_predictions import MemberLogits, read_member_logits
from convoy.storage.runs import RunFolder
from convoy.storage.stores import open_store
from train_jobs import NUM_ROWS, frozen_digits
from training_faults import begun
from tune_jobs import EARLY, NETWORK, PROBE, SETTINGS, TuneJob, assert_each_trial_ran_once

pytestmark = pytest.mark.integration

# A training by its form, but the network has no such stage, which only the trial finds out.
IMPOSSIBLE = "{strategy: from_scratch, epochs: 1, freeze_depth: nowhere}"
# None of them learns anything: the first begins with a fitted head, the others with what chance gives.
AHEAD = "{strategy: fine_tune, learning_rate: 1.0e-9}"
BEHIND = [f"{{strategy: from_scratch, learning_rate: {rate}}}" for rate in ("1.0e-9", "1.0e-8")]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory, ray_cluster: Mapping[str, str]) -> TuneJob:
    workspace = frozen_digits(tmp_path_factory.mktemp("digits"))
    return TuneJob(workspace, (*SETTINGS, "base.workers={cpus_per_worker: 1}"), ray_cluster)


@pytest.fixture
def job(digits: TuneJob, tmp_path: Path) -> TuneJob:
    """On a copy of the workspace that has only the dataset."""
    copy = shutil.copytree(Path(digits.workspace, "datasets"), tmp_path / "workspace" / "datasets")
    return replace(digits, workspace=str(copy.parent))


def test_a_search_keeps_what_its_trials_are_worth_and_survives_one_that_fails(job: TuneJob) -> None:
    ways = f"space.config={{grid: [{PROBE}, {IMPOSSIBLE}, {NETWORK}, {EARLY}]}}"
    report = job.changed("name=search", ways, "max_concurrent=2").run_here()
    assert_each_trial_ran_once(job)
    states = [trial["state"] for trial in report["trials"]]
    assert states == ["finished", "failed", "finished", "finished"]
    failed = report["trials"][1]
    assert "nowhere" in failed["reason"]
    assert failed["bundles"] == []
    for trial in report["trials"]:
        if trial["state"] == "finished":
            assert_kept(job, trial)

    assert report["best_single"] in [name for trial in report["trials"] for name in trial["bundles"]]
    assert report["gain_interval"]["estimate"] == report["gain"]
    assert report["front"]
    evaluated = convoy_here(
        "evaluate", report["ensemble"], "--dataset", "digits", "--workspace", job.workspace, "--json"
    )
    assert evaluated.returncode == 0, evaluated.stderr
    assert last_json(evaluated)["top1"] == report["evaluation"]["top1"]

    folder = job.search_folder()
    assert "<html" in (folder / "ensemble.html").read_text()
    for name in ("parallel_coordinates.png", "learning_curves.png"):
        with Image.open(folder / name) as picture:
            assert picture.size == (1200, 800)
    table = pq.read_table(folder / "trials.parquet").to_pylist()
    assert [row["state"] for row in table] == states
    assert (folder / "_SUCCESS").exists()
    assert restarts("ActorLocationTracker") == [0], (
        "an actor of all pipelines died with the trial that made it"
    )
    assert not [path for path in (folder / "ray_tune").rglob("*") if path.is_file()], "pickles stay behind"


def restarts(name: str) -> list[int]:
    """How often each actor of a name, dead ones too, was started again in the cluster of this process."""
    actors: Mapping[str, Mapping[str, Any]] = ray._private.state.actors()
    return [actor["NumRestarts"] for actor in actors.values() if actor["Name"] == name]


def assert_kept(job: TuneJob, trial: dict[str, Any]) -> None:
    """A finished trial has a bundle measured on val alone, and logits of each validation row and view."""
    (bundle,), (predictions_run,) = trial["bundles"], trial["predictions_runs"]
    card = Path(job.workspace, "models", *bundle.split("@"), "README.md").read_text()
    assert "On the val split" in card
    assert "validation rows, by which the model may have been chosen" in card
    run = Path(job.workspace, "runs", predictions_run)
    assert json.loads((run / "run.json").read_text())["identity"]["splits"] == ["val"]
    logits = kept_logits(job, predictions_run)
    num_classes = 10
    assert logits.logits_MVNK.shape == (1, 10, NUM_ROWS["val"], num_classes)
    assert len(set(logits.sample_ids)) == NUM_ROWS["val"]
    cost = trial["cost"]
    assert cost["num_views"] == 10
    assert min(cost["parameters"], cost["macs"], cost["size_bytes"], cost["images_per_s"]) > 0


def kept_logits(job: TuneJob, run: str) -> MemberLogits:
    store = open_store(job.workspace)
    manifest = read_manifest(RunFolder(store, run))
    assert manifest is not None
    return read_member_logits(store, manifest)


def freeze_without_val(digits: TuneJob, workspace: str) -> None:
    """The training images alone, as a dataset that has no other split."""
    images = Path(digits.workspace).parent / "images" / "train"
    fractions = settings_arguments("splits={val_fraction: 0, test_fraction: 0}")
    convoy_json_here("dataset", str(images), "--name", "digits", "--workspace", workspace, *fractions)


@pytest.mark.slow
def test_asha_stops_a_trial_that_lags_behind_and_the_next_one_has_its_cpus(job: TuneJob) -> None:
    # One after the other: of two at once, the first to reach a rung is not judged there, and either may be first.
    report = job.changed(
        "name=search",
        "base.epochs=4",
        "base.workers={cpus_per_worker: null}",
        f"space.config={{grid: [{AHEAD}, {', '.join(BEHIND)}]}}",
        "scheduler={kind: asha, reduction_factor: 2}",
        "max_concurrent=1",
    ).run_here()
    good, *lagging = report["trials"]
    assert good["state"] == "finished"
    assert good["num_epochs"] == 4
    assert len(lagging) == 2
    for trial in lagging:
        assert trial["state"] == "stopped"
        assert "not among the best" in trial["reason"]
        assert trial["num_epochs"] < 4
        assert trial["bundles"] == []
    runs = list_runs(open_store(job.workspace)).runs
    states = sorted(run.state for run in runs if run.verb == "train")
    assert states == ["finished", "given up", "given up"]


@pytest.mark.slow
def test_asha_knows_the_epochs_before_the_checkpoint_that_a_trial_goes_on_from(
    job: TuneJob, tmp_path: Path
) -> None:
    job = job.changed(
        "name=search",
        "base.strategy=from_scratch",
        "base.epochs=4",
        "space.learning_rate={grid: [0.05]}",
        "scheduler={kind: asha, reduction_factor: 2}",
    )
    arrivals = tmp_path / "arrivals"
    # In the third epoch of six steps each; the driver of a training steps nowhere.
    workers = {"env_vars": {"CONVOY_CRASH_POINT": f"{CrashPoint.TRAINING_STEP}:15:{arrivals}"}}
    finished = job.start({"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": workers})})
    assert finished.returncode == 0, finished.stderr
    assert arrivals.stat().st_size > 24, "the fault did not fire"
    (record,) = job.records().values()
    assert (record["state"], [epoch for epoch, _ in record["epochs"]]) == ("finished", [1, 2, 3, 4])


@pytest.mark.slow
def test_optuna_searches_without_repeating_itself(job: TuneJob) -> None:
    space = "space={tap: {choice: [c1, c3, f6]}, head.gradient_tolerance: {log_uniform: [1.0e-6, 1.0e-4]}}"
    report = job.changed(
        "name=search", "base.strategy=early_layer_probe", space, "search=optuna", "budget.trials=3"
    ).run_here()
    assert [trial["state"] for trial in report["trials"]] == ["finished"] * 3
    assert len({str(trial["values"]) for trial in report["trials"]}) == 3


PROBES = ("name=search", "max_concurrent=1", f"space.config={{grid: [{PROBE}, {EARLY}]}}")
SEARCH = ("name=search", "max_concurrent=1", f"space.config={{grid: [{PROBE}, {EARLY}, {NETWORK}]}}")


def test_a_killed_driver_goes_on_with_the_trials_that_have_not_ended(job: TuneJob, tmp_path: Path) -> None:
    job = job.changed(*SEARCH)
    arrivals = tmp_path / "arrivals"
    fault = {"CONVOY_CRASH_POINT": f"{CrashPoint.TRIAL_DRAWN}:3:{arrivals}"}
    killed = job.start(fault)
    assert arrivals.stat().st_size == 3, "the fault did not fire"
    assert killed.returncode == -signal.SIGKILL
    before = job.records()
    assert (len(before), len(job.drawn())) == (2, 3)
    assert not (job.search_folder() / "_SUCCESS").exists()

    resumed = job.start(fault)
    assert resumed.returncode == 0, resumed.stderr
    assert_each_trial_ran_once(job)
    after = job.records()
    assert {trial: after[trial] for trial in before} == before, "a finished trial ran again"
    assert [record["state"] for record in after.values()] == ["finished"] * 3


@pytest.mark.slow
def test_a_driver_killed_while_a_trial_trains_ends_as_an_undisturbed_search(
    job: TuneJob, tmp_path: Path
) -> None:
    job = job.changed(*PROBES[:2], f"space.config={{grid: [{EARLY}, {NETWORK}]}}")
    arrivals = tmp_path / "arrivals"
    # In the second of three epochs of six steps. The worker is seconds in coming back, and the driver dies in them.
    workers = {"env_vars": {"CONVOY_CRASH_POINT": f"{CrashPoint.TRAINING_STEP}:8:{arrivals}"}}
    fault = {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": workers})}
    with begun(replace(job, environment={**job.environment, **fault})) as driver:
        wait_for(lambda: arrivals.exists() and arrivals.stat().st_size >= 8, driver, timeout_s=TIMEOUT_S)
        driver.kill()
        driver.wait()
    before = job.records()
    assert (len(before), len(job.drawn())) == (1, 2), (
        "the driver was not killed while the second trial trained"
    )

    resumed = job.start({})
    assert resumed.returncode == 0, resumed.stderr
    assert_each_trial_ran_once(job)
    after = job.records()
    assert {trial: after[trial] for trial in before} == before, "a finished trial ran again"

    other = tmp_path / "undisturbed"
    shutil.copytree(Path(job.workspace, "datasets"), other / "datasets")
    undisturbed = replace(job, workspace=str(other))
    undisturbed.run_here()
    assert outcomes(job) == outcomes(undisturbed)


def outcomes(job: TuneJob) -> list[tuple[Any, ...]]:
    """What was drawn for each trial of a search, and what became of it."""
    fields = ("values", "state", "top1", "epochs")
    return [tuple(record[name] for name in fields) for record in job.records().values()]


@pytest.mark.slow
@pytest.mark.parametrize("point", [CrashPoint.TRIAL_TRAINED, CrashPoint.TRIAL_RECORDED])
def test_a_killed_trial_goes_on_in_another_process(point: CrashPoint, job: TuneJob, tmp_path: Path) -> None:
    job = job.changed(*PROBES[:2], f"space.config={{grid: [{NETWORK}, {EARLY}]}}")
    arrivals = tmp_path / "arrivals"
    # For the workers only: the driver records no trial here.
    workers = {"env_vars": {"CONVOY_CRASH_POINT": f"{point}:1:{arrivals}"}}
    finished = job.start({"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": workers})})
    assert finished.returncode == 0, finished.stderr
    # A trial that was killed after its training came by there once more; a recorded one did not.
    assert arrivals.stat().st_size == (3 if point is CrashPoint.TRIAL_TRAINED else 2), (
        "the fault did not fire"
    )
    assert_each_trial_ran_once(job)
    assert [record["state"] for record in job.records().values()] == ["finished"] * 2


def test_a_finished_search_gives_its_report_again_and_goes_on_by_a_larger_budget(job: TuneJob) -> None:
    short = job.changed(*PROBES, "budget={trials: 1}")
    report = short.run_here()
    first = job.records()
    assert len(first) == 1
    assert short.run_here() == report

    larger = job.changed(*PROBES, "budget={trials: 2}")
    longer = larger.run_here()
    both = job.records()
    assert longer["run"] == report["run"]
    assert len(both) == 2
    assert {trial: both[trial] for trial in first} == first, "a finished trial ran again"

    alone = larger.changed("ensemble={max_members: 1}").run_here()
    assert (alone["run"], len(alone["members"])) == (report["run"], 1)
    assert job.records() == both


@pytest.mark.slow
def test_trials_that_the_end_of_the_time_cut_short_go_on_with_a_larger_budget(job: TuneJob) -> None:
    # Two seconds, in which no trial comes to its end.
    short = job.changed(*PROBES, "budget={hours: 0.0005}")
    for _call in range(2):
        failed = convoy_here(*short.arguments())
        assert failed.returncode == 1, failed.stderr
        assert "raise the budget, and run the same command again" in failed.stderr
        assert job.records() == {}
    drawn = job.drawn()
    assert drawn

    report = job.changed(*PROBES, "budget={hours: 1}").run_here()
    assert [trial["state"] for trial in report["trials"]] == ["finished"] * 2
    assert set(drawn) <= {trial["trial"] for trial in report["trials"]}
    assert_each_trial_ran_once(job)


@pytest.mark.slow
def test_a_driver_killed_while_it_measures_the_ensemble_trains_nothing_again(
    job: TuneJob, tmp_path: Path
) -> None:
    job = job.changed(*PROBES)
    arrivals = tmp_path / "arrivals"
    # The only run that the driver itself publishes: the predictions of the test rows.
    fault = {"CONVOY_CRASH_POINT": f"{CrashPoint.MANIFEST_PUBLISHED}:1:{arrivals}"}
    killed = job.start(fault)
    assert arrivals.stat().st_size == 1, "the fault did not fire"
    assert killed.returncode == -signal.SIGKILL
    before = job.records()
    assert len(before) == 2

    resumed = job.start(fault)
    assert resumed.returncode == 0, resumed.stderr
    assert job.records() == before
    report = last_json(resumed)
    assert report["measured"]["rows"] == "test"
    assert report["measured"]["num_rows"] == NUM_ROWS["test"]


@pytest.mark.slow
def test_folds_choose_by_every_training_row_and_need_no_validation_rows(
    digits: TuneJob, tmp_path: Path
) -> None:
    workspace = str(tmp_path / "workspace")
    freeze_without_val(digits, workspace)
    job = replace(digits, workspace=workspace).changed(*PROBES, "folds=2")
    report = job.run_here()
    num_rows = NUM_ROWS["train"]
    for trial in report["trials"]:
        assert trial["state"] == "finished"
        assert len(set(trial["bundles"])) == len(set(trial["predictions_runs"])) == 2
        ids = [name for run in trial["predictions_runs"] for name in kept_logits(job, run).sample_ids]
        assert len(set(ids)) == len(ids) == num_rows
        assert 0.5 < trial["top1"] < 1
    # Without a test split either: five parts of the training rows, each chosen for by the others.
    assert report["measured"]["num_rows"] == num_rows


def test_a_dataset_without_validation_rows_is_refused(digits: TuneJob, tmp_path: Path) -> None:
    workspace = str(tmp_path / "workspace")
    freeze_without_val(digits, workspace)
    refused = convoy_here(*replace(digits, workspace=workspace).changed(*SEARCH).arguments())
    assert refused.returncode == 2
    assert "validation rows, and the dataset has none" in refused.stderr
