"""`convoy train` of networks on a real Ray: each strategy's bundle, its report, its workers, and its refusals."""

from __future__ import annotations

import shutil
import signal
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from awkward_images import awkward_cases
from cache_jobs import freeze, write_digits
from command_lines import convoy_here, last_json, settings_arguments
from convoy.cluster.training import WorkerOptions, plan_workers
from convoy.core.crash_points import CrashPoint
from convoy.core.errors import ClusterError
from convoy.core.records import Split
from convoy.pipelines.training_rows import RowLimit, read_split
from convoy.storage.datasets import open_dataset
from convoy.storage.runs import RunFolder
from convoy.storage.stores import open_store
from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.backbones import build_network
from convoy.vision.weights import state_to_safetensors
from train_jobs import LENET, NUM_ROWS, PRESET, TrainJob, frozen_digits, timeless, write_splits

pytestmark = pytest.mark.integration

RECIPE = "recipe={batch_size: 16, precision: fp32}"
FP32 = "extraction={precision: fp32}"
# Draws depend on where the files lie: with them the loss of a network that already fits goes up or down.
PLAIN = "augmentation=none"
HEAD_ALONE = (
    "strategy=fine_tune",
    "epochs=null",
    "learning_rate=null",
    "phases=[{name: head, epochs: 1, freeze_depth: body, learning_rate: 0.1}]",
    "head_source=cache",
)
# The command tells it right before the group is started.
WORKERS_START = "starting the training workers"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory, ray_cluster: Mapping[str, str]) -> TrainJob:
    """LeNet-5 from scratch on digits in three splits, with one thread a worker; tests change it."""
    workspace = frozen_digits(tmp_path_factory.mktemp("digits"))
    # Sums of two threads differ in their last bits from those of one, and so would trainings.
    threads = "workers.cpus_per_worker=1"
    settings = (
        threads,
        f"backbone={LENET}",
        "strategy=from_scratch",
        "epochs=2",
        "learning_rate=0.02",
        RECIPE,
        FP32,
    )
    return TrainJob(workspace, settings, ray_cluster)


@pytest.fixture(scope="module")
def one_worker(digits: TrainJob) -> dict[str, Any]:
    """The report of a training by one worker, to which others are compared."""
    return digits.changed("name=one").run_here()


@pytest.fixture(scope="module")
def evaluate_elsewhere(
    digits: TrainJob, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What `convoy evaluate` says of a report's bundle where there is nothing but the bundle and the dataset."""

    def evaluate(report: dict[str, Any]) -> dict[str, Any]:
        workspace = tmp_path_factory.mktemp("elsewhere") / "workspace"
        name = report["bundle"].partition("@")[0]
        for folder in ("datasets", f"models/{name}"):
            shutil.copytree(Path(digits.workspace, folder), workspace / folder)
        finished = convoy_here(
            "evaluate", report["bundle"], "--dataset", "digits", "--workspace", str(workspace), "--json"
        )
        assert finished.returncode == 0, finished.stderr
        return last_json(finished)

    return evaluate


def assert_same_worth(report: dict[str, Any], evaluation: dict[str, Any]) -> None:
    assert evaluation["samples"] == NUM_ROWS["test"]
    for name in ("model_digest", "top1", "top5", "nll", "confusion"):
        assert report[name] == evaluation[name], name


def assert_training_was_reported(report: dict[str, Any], num_epochs: int) -> None:
    """What every training of a network says of itself, whatever its strategy."""
    history = report["history"]
    assert [epoch["epoch"] for epoch in history] == list(range(1, num_epochs + 1))
    assert sum(phase["epochs"] for phase in report["phases"]) == num_epochs
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert all(0 <= epoch["val_top1"] <= 1 for epoch in history)
    with Image.open(report["learning_curves"]) as curves:
        assert curves.format == "PNG"
        assert min(curves.size) > 200
    run = Path(report["learning_curves"]).parent
    assert run.name == report["train_run"]
    assert {"_SUCCESS", "history.json", "report.json", "trained.json"} <= {
        path.name for path in run.iterdir()
    }


def test_partial_reuse_puts_new_layers_on_early_stages(
    digits: TrainJob, evaluate_elsewhere: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    reuse = "reuse={after: c1, convs: [{width: 8, stride: 2}], hidden_widths: [16]}"
    partial = digits.changed("name=reuse", "strategy=partial_reuse", reuse, "freeze_depth=body", PLAIN)
    report = partial.run_here()
    assert_training_was_reported(report, num_epochs=2)
    assert report["head"] is None
    (phase,) = report["phases"]
    assert phase["freeze_depth"] == 1
    assert any("stages frozen, up to body.c1" in note for note in report["notes"])
    assert_same_worth(report, evaluate_elsewhere(report))


def test_fine_tuning_begins_with_a_head_from_the_cache(
    digits: TrainJob, evaluate_elsewhere: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    """In a process of its own, as a person runs it."""
    report = digits.changed("name=tuned", "strategy=fine_tune", "freeze_depth=c1", PLAIN).run()
    assert_training_was_reported(report, num_epochs=2)
    (phase,) = report["phases"]
    assert (phase["name"], phase["freeze_depth"]) == ("body", 1)
    assert any("phase head is a fit from the feature cache instead" in note for note in report["notes"])
    head = report["head"]
    assert (head["num_rows"], head["converged"]) == (NUM_ROWS["train"], True)
    assert head["num_passes"] > len(head["trials"]) == 7
    assert head["fit_seconds"] > 0
    # So few images tell nothing of the time that a pass through the body takes.
    assert (head["body_pass_s"], head["saved_s"]) == (None, None)
    assert_same_worth(report, evaluate_elsewhere(report))


def test_fine_tuning_of_the_head_alone_needs_no_training_worker(digits: TrainJob) -> None:
    finished = digits.changed("name=head", *HEAD_ALONE).start_here()
    assert finished.returncode == 0, finished.stderr
    report = last_json(finished)
    assert WORKERS_START not in finished.stderr
    assert (report["phases"], report["history"], report["learning_curves"]) == ([], [], None)
    assert report["head"]["num_rows"] == NUM_ROWS["train"]


def test_a_driver_killed_while_it_fits_the_first_head_goes_on_at_the_next_c(
    digits: TrainJob, tmp_path: Path
) -> None:
    arrivals = tmp_path / "arrivals"
    fault = {"CONVOY_CRASH_POINT": f"{CrashPoint.HEAD_POINT_KEPT}:3:{arrivals}"}
    job = digits.changed("name=killed", *HEAD_ALONE)
    disturbed = replace(job, environment={**job.environment, **fault})
    killed = disturbed.start()
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    kept = list(Path(digits.workspace).glob("runs/*/head_points/**/*.npz"))
    assert len(kept) == arrivals.stat().st_size == 3, "the fault did not fire"
    report = disturbed.run()
    # The arrivals of both: no C was fitted twice.
    assert arrivals.stat().st_size == len(report["head"]["trials"]) == 7
    undisturbed = digits.changed("name=undisturbed", *HEAD_ALONE).run_here()
    assert report["head"]["trials"] == undisturbed["head"]["trials"]
    assert report["head"]["num_passes"] == undisturbed["head"]["num_passes"]
    digests = [one["bundle"].partition("@")[2] for one in (report, undisturbed)]
    assert digests[0] == digests[1] != ""
    assert not any(path.exists() for path in kept)


def test_network_as_it_is_answers_in_the_classes_of_a_map(
    digits: TrainJob, evaluate_elsewhere: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    names = [f"{kind}{digit}" for kind in ("old", "new") for digit in range(10)]
    class_map = {name: name[-1] for name in names}
    settings = ("strategy=as_is", "epochs=null", "learning_rate=null", "backbone.num_classes=20")
    job = digits.changed("name=mapped", *settings, f"classes={names}", f"class_map={class_map}")
    finished = job.start_here()
    assert finished.returncode == 0, finished.stderr
    report = last_json(finished)
    assert WORKERS_START not in finished.stderr
    assert (report["strategy"], report["num_train_rows"]) == ("as_is", 0)
    assert (report["train_run"], report["phases"], report["history"]) == (None, [], [])
    assert report["classes"] == [str(digit) for digit in range(10)]
    assert_same_worth(report, evaluate_elsewhere(report))


@pytest.mark.slow
def test_equal_inputs_give_equal_bundles_and_another_seed_does_not(
    digits: TrainJob, one_worker: dict[str, Any]
) -> None:
    again = digits.changed("name=one").run_here()
    assert again["bundle"] == one_worker["bundle"]
    assert again["train_run"] != one_worker["train_run"]
    assert timeless(again["history"]) == timeless(one_worker["history"])
    other = digits.changed("name=one", "recipe.seed=1").run_here()
    assert other["bundle"] != one_worker["bundle"]


def test_two_workers_learn_as_one_does_with_the_same_batch(
    digits: TrainJob, one_worker: dict[str, Any]
) -> None:
    """LeNet-5 has no BatchNorm, so only the order of additions differs: some 1e-7 a step, which training amplifies."""
    report = digits.changed("name=two", "workers.num_workers=2").run_here()
    assert len(report["history"]) == len(one_worker["history"])
    for found, expected in zip(report["history"], one_worker["history"], strict=True):
        for name in ("train_loss", "val_nll"):
            assert found[name] == pytest.approx(expected[name], rel=1e-4), name
        # Each of the 33 validation rows counts once: a row more or less would be seen here.
        for name in ("images", "val_top1", "train_top1", "learning_rate"):
            assert found[name] == expected[name], name


def test_two_workers_with_batchnorm_learn_as_one_does_in_the_same_passes(digits: TrainJob) -> None:
    """BatchNorm takes its statistics over a pass: two passes of each of two workers are the four of one worker.

    Over four images it amplifies what the order of additions changes: one thread more moves the loss by some 5e-4.
    """
    job = digits.changed(
        f"backbone={{arch: cifar_resnet20, weights: random, preset: {PRESET}}}", "learning_rate=0.002"
    )
    one = job.changed("name=four-passes", "recipe.accumulate=4").run_here()
    two = job.changed("name=two-passes", "recipe.accumulate=2", "workers.num_workers=2").run_here()
    assert [epoch["train_loss"] for epoch in two["history"]] == pytest.approx(
        [epoch["train_loss"] for epoch in one["history"]], rel=2e-3
    )
    # Each worker has statistics of its own, and both have measured the val rows with those that are in the bundle.
    evaluated = convoy_here(
        *("evaluate", two["bundle"], "--dataset", "digits", "--workspace", digits.workspace, "--json"),
        *settings_arguments("splits=[val]", FP32),
    )
    assert evaluated.returncode == 0, evaluated.stderr
    assert last_json(evaluated)["nll"] == pytest.approx(two["history"][-1]["val_nll"], rel=1e-5)


def test_split_ingest_gives_the_very_training_of_the_fused_one(
    digits: TrainJob, one_worker: dict[str, Any]
) -> None:
    workers = "workers={ingest: split, cpus_per_worker: 1}"
    report = digits.changed("name=split", workers).run_here()
    assert timeless(report["history"]) == timeless(one_worker["history"])
    assert report["model_digest"] == one_worker["model_digest"]


def test_training_images_that_cannot_be_used_are_rejected_with_their_codes(
    digits: TrainJob, tmp_path: Path
) -> None:
    write_splits(tmp_path / "images")
    expected = {}
    for number, case in enumerate(awkward_cases()):
        sample_id = f"train/{number % 10}/awkward-{case.name}"
        (tmp_path / "images" / sample_id).write_bytes(case.data)
        if case.expected is not None:
            expected[sample_id] = case.expected.value
    spoiled = sorted((tmp_path / "images" / "val").glob("*/*.jpg"))[:3]
    for path in spoiled:
        path.write_bytes(b"no image")
    job = replace(digits, workspace=str(tmp_path / "workspace"))
    num_train = freeze(tmp_path / "images", job.workspace)["splits"]["train"]
    finished = job.changed("name=awkward", "error_budget={rate: 0, rows: 5}").start_here()
    # More than the budget allows, so the code says so; the results are there.
    assert finished.returncode == 3, finished.stderr
    report = last_json(finished)
    assert_training_was_reported(report, num_epochs=2)
    assert report["train_rejects"] == Counter(expected.values())
    assert (report["num_train_rows"], report["rejects"]) == (num_train - len(expected), 0)
    assert report["val_rejects"] == 3
    for epoch in report["history"]:
        assert epoch["val_rejects"] == 3
        assert (epoch["images"], epoch["rejects"]) == (num_train - len(expected), len(expected))
    store = open_store(job.workspace)
    prefix = RunFolder(store, report["train_run"]).key("rejects/")
    (table,) = (pq.read_table(store.uri(info.key)) for info in store.list_objects(prefix))
    rows = {row["sample_id"]: row for row in table.to_pylist()}
    assert {name: row["code"] for name, row in rows.items()} == expected
    assert all(row["reason"] for row in rows.values())


def test_fewer_rows_a_class_are_among_the_more(digits: TrainJob) -> None:
    manifest = open_dataset(open_store(digits.workspace), "digits")
    drawn = {
        (number, seed): read_split(manifest, Split.TRAIN, RowLimit(max_per_class=number, seed=seed))
        for number, seed in ((2, 0), (5, 0), (2, 1))
    }
    ids = {key: set(rows["sample_id"].to_pylist()) for key, rows in drawn.items()}
    assert ids[2, 0] < ids[5, 0]
    assert ids[2, 0] != ids[2, 1]
    counts = Counter(drawn[2, 0]["label"].to_pylist())
    assert counts == dict.fromkeys(range(10), 2)
    finished = convoy_here(*digits.changed("name=few", "rows={max_per_class: 2}").arguments(), "--dry-run")
    assert last_json(finished)["num_train_rows"] == 20


@pytest.fixture(scope="module")
def odd_datasets(digits: TrainJob) -> None:
    """Datasets that no training can use: `gappy` has a class without training images, `bare` has no labels."""
    folder = Path(digits.workspace).parent
    write_splits(folder / "gappy")
    shutil.rmtree(folder / "gappy" / "train" / "9")
    freeze(folder / "gappy", digits.workspace, name="gappy")
    (folder / "bare").mkdir()
    write_digits(folder / "labelled", 4)
    for path in (folder / "labelled").rglob("*.jpg"):
        path.rename(folder / "bare" / path.name)
    freeze(folder / "bare", digits.workspace, name="bare")
    (folder / "animals" / "test" / "cat").mkdir(parents=True)
    write_digits(folder / "animals" / "test", 9)
    (folder / "animals" / "test" / "8").rename(folder / "animals" / "test" / "dog")
    freeze(folder / "animals", digits.workspace, name="animals")


TUNE = ("strategy=fine_tune",)
REUSE = ("strategy=partial_reuse",)
REFUSALS = {
    "a class without images": (["dataset=gappy"], 1, ["1 classes have no training image: 9"]),
    "no labels": (["dataset=bare"], 1, ["no labelled sample in split train"]),
    "a batch too large": (
        ["recipe={batch_size: 97}"],
        2,
        ["a batch of 97 rows cannot be filled from 96 training rows", "recipe.batch_size"],
    ),
    "a batch too small": (
        ["recipe={batch_size: 1}", "workers.num_workers=2"],
        2,
        ["a batch of 1 images leaves some of 2 workers without any"],
    ),
    "too deep": (
        [*TUNE, "freeze_depth=6"],
        2,
        ["a freeze depth of 6 is impossible: the network has 6 stages", "0 (nothing frozen) to 5"],
    ),
    "fp16 without a GPU": (
        ["recipe={batch_size: 16, precision: fp16}"],
        2,
        ["fp16 needs a GPU, and the workers have none", "recipe.precision"],
    ),
    "an unknown stage": ([*TUNE, "freeze_depth=c4"], 2, ["c4", "c3"]),
    "an unknown stage to reuse": ([*REUSE, "reuse={after: conv1}"], 2, ["conv1", "c1"]),
    "foreign weights": (
        [*TUNE, f"backbone={{arch: lenet5, weights: FOREIGN, preset: {PRESET}}}"],
        2,
        ["the weights do not fit the network", "c1.weight", "LeNet5"],
    ),
    "weights from scratch": (
        [f"backbone={{arch: lenet5, weights: FOREIGN, preset: {PRESET}}}"],
        2,
        ["from_scratch takes no pretrained weights"],
    ),
    "a head that is no first phase": (
        [
            *TUNE,
            "epochs=null",
            "learning_rate=null",
            "phases=[{name: all, epochs: 1, learning_rate: 0.1}]",
            "head_source=cache",
        ],
        2,
        ["the head cannot come from the feature cache", "freeze_depth: body"],
    ),
    "classes of another kind": (
        [
            "strategy=as_is",
            "epochs=null",
            "learning_rate=null",
            "classes=[a, b, c, d, e, f, g, h, i, j]",
        ],
        2,
        ["does not know 10 classes of the dataset: 0, 1, 2, 3, 4"],
    ),
}


@pytest.mark.usefixtures("odd_datasets")
@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_trained_is_refused_before_any_worker_starts(
    digits: TrainJob, tmp_path: Path, case: str
) -> None:
    settings, code, messages = REFUSALS[case]
    foreign = tmp_path / "cifar.safetensors"
    network = build_network(BackboneConfig(arch="cifar_resnet20", weights="random"))
    foreign.write_bytes(state_to_safetensors(network.state_dict()))
    wanted = [setting.replace("FOREIGN", str(foreign)) for setting in settings]
    finished = digits.changed("name=refused", *wanted).start_here()
    assert (finished.returncode, finished.stdout) == (code, "")
    for message in messages:
        assert message in finished.stderr
    assert WORKERS_START not in finished.stderr
    assert not Path(digits.workspace, "models", "refused").exists()


@pytest.mark.usefixtures("odd_datasets")
def test_a_bundle_is_not_measured_on_classes_that_it_does_not_know(
    digits: TrainJob, one_worker: dict[str, Any]
) -> None:
    finished = convoy_here(
        "evaluate", one_worker["bundle"], "--dataset", "animals", "--workspace", digits.workspace
    )
    assert (finished.returncode, finished.stdout) == (2, "")
    assert "does not know 1 classes of the dataset: dog" in finished.stderr


def test_a_group_that_the_cluster_cannot_hold_is_refused_with_numbers(digits: TrainJob) -> None:
    with pytest.raises(ClusterError) as caught:
        plan_workers(WorkerOptions(num_workers=300, cpus_per_worker=7), timeout_s=1)
    assert "the cluster cannot hold 300 workers of 7 CPUs: after 1 s it has" in str(caught.value)
    assert "CPUs and 0 GPUs" in str(caught.value)
    assert "workers.num_workers" in caught.value.next_step


def test_an_unfinished_training_of_the_same_name_is_not_mixed_with_another(digits: TrainJob) -> None:
    """A training that ended in an error stays open; other settings are refused with the difference."""
    wild = digits.changed("name=wild", "learning_rate=1e38")
    diverged = wild.start_here()
    assert diverged.returncode == 1
    assert "no finite number" in diverged.stderr
    tame = wild.changed("learning_rate=0.02")
    refused = tame.start_here()
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "config.learning_rate: was 1e+38, is 0.02" in refused.stderr
    assert "--new-run" in refused.stderr
    fresh = convoy_here(*tame.arguments(), "--new-run")
    assert fresh.returncode == 0, fresh.stderr
