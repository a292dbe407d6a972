"""Jobs on a cluster of several nodes: the work goes to all of them, and what comes out is that of one node."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from cache_jobs import cached_features
from chaos_jobs import wait_for
from checkpoint_records import checkpoint_records
from command_lines import TIMEOUT_S, convoy_here, last_json, settings_arguments
from convoy.storage.commits import read_manifest
from convoy.storage.runs import RunFolder
from convoy.storage.stores import open_store
from made_bundles import made_classifier, write_classifier
from ray_nodes import HEALTH_CHECKS, PlacementWatch, raylet_of, running_nodes
from train_jobs import LENET, TrainJob, frozen_digits, timeless
from training_faults import begun
from tune_jobs import SETTINGS, TuneJob, assert_each_trial_ran_once

# Seven minutes on two cores; `make integration` runs it.
pytestmark = [pytest.mark.integration, pytest.mark.slow]

NUM_CPUS = 2
SLICES = "extraction={batch_size: 16, slice_rows: 16, precision: fp32, dtype: float32}"
TRAINING = (
    "name=net",
    f"backbone={LENET}",
    "strategy=from_scratch",
    "epochs=3",
    "learning_rate=0.02",
    "recipe={batch_size: 16, precision: fp32}",
    "augmentation=light",
    "extraction={precision: fp32}",
)
SEARCH = (
    *SETTINGS,
    "name=search",
    "base.strategy=from_scratch",
    "base.epochs=3",
    "space.learning_rate={grid: [0.05, 0.02]}",
)
MANY_EPOCHS = 60
# The titles that Ray gives workers of ours.
OPERATOR, PREPARER, TRAINER = r"SliceWorker", r"_Preparer", r"RayTrainWorker"


@dataclass(frozen=True, slots=True)
class Jobs:
    """All jobs, each in a workspace that has only the dataset `digits` and a bundle, by the Ray that is open here."""

    base: Path
    folder: Path

    def workspace(self) -> str:
        """A fresh copy."""
        number = len(list(self.folder.iterdir()))
        return str(shutil.copytree(self.base, self.folder / str(number)))

    def cache(self) -> dict[str, dict[str, np.ndarray]]:
        """The features of each set by sample id."""
        workspace, report = self._run("cache", f"backbone={LENET}", "taps=[c3, f6]")
        return {tap: cached_features(workspace, set_id) for tap, set_id in report["sets"].items()}

    def score_digest(self) -> str:
        """Of all rows of a scoring."""
        workspace, report = self._run("score", "bundle=one", "columns={outputs: logits, features: f6}")
        manifest = read_manifest(RunFolder(open_store(workspace), report["run"]))
        assert manifest is not None
        return manifest.rows_digest()

    def train(self, *settings: str) -> dict[str, Any]:
        """The report of a training."""
        return TrainJob(self.workspace(), (*TRAINING, *settings)).run_here()

    def tune(self) -> list[tuple[Any, ...]]:
        """What is known of the two trials of a search."""
        job = TuneJob(self.workspace(), SEARCH)
        report = job.run_here()
        assert_each_trial_ran_once(job)
        return [outcome(trial) for trial in report["trials"]]

    def _run(self, verb: str, *settings: str) -> tuple[str, dict[str, Any]]:
        workspace = self.workspace()
        given = settings_arguments("dataset=digits", SLICES, *settings)
        finished = convoy_here(verb, "--workspace", workspace, *given, "--json")
        assert finished.returncode == 0, finished.stderr
        return workspace, last_json(finished)


def outcome(trial: Mapping[str, Any]) -> tuple[Any, ...]:
    """What of a trial does not depend on where and when it ran."""
    # The digest of a bundle is over its weights.
    digests = [bundle.partition("@")[2] for bundle in trial["bundles"]]
    return trial["values"], trial["state"], trial["num_epochs"], trial["top1"], digests


@dataclass(frozen=True, slots=True)
class OneNode:
    """What the jobs leave on a single node of as many CPUs as each of the others has."""

    features: dict[str, dict[str, np.ndarray]]
    score_digest: str
    training: dict[str, Any]
    trials: list[tuple[Any, ...]]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    workspace = frozen_digits(tmp_path_factory.mktemp("digits"))
    store = open_store(workspace)
    write_classifier(store, "one", made_classifier(store, 0))
    return Jobs(Path(workspace), tmp_path_factory.mktemp("workspaces"))


@pytest.fixture(scope="module")
def one_node(jobs: Jobs) -> OneNode:
    quiet: Any = {"logging_level": logging.ERROR, "log_to_driver": False}
    ray.init("local", num_cpus=NUM_CPUS, num_gpus=0, include_dashboard=False, **quiet)
    try:
        return OneNode(jobs.cache(), jobs.score_digest(), jobs.train(), jobs.tune())
    finally:
        ray.shutdown()


@pytest.fixture(scope="module")
def two_nodes(one_node: OneNode) -> Iterator[Cluster]:
    """Two nodes, after the one node has done its part; this process is a driver of them."""
    assert one_node
    with running_nodes(NUM_CPUS, NUM_CPUS) as cluster:
        ray.init(cluster.address, logging_level=logging.ERROR, log_to_driver=False)
        yield cluster
        ray.shutdown()


@pytest.fixture
def with_gpu(two_nodes: Cluster) -> Iterator[int]:
    """A third node that says it has a GPU, as far as plans and places go; its process. PyTorch finds none there."""
    node = two_nodes.add_node(num_cpus=NUM_CPUS, num_gpus=1)
    two_nodes.wait_for_nodes()
    yield raylet_of(node)
    two_nodes.remove_node(node)


def raylets(cluster: Cluster) -> set[int]:
    return {raylet_of(node) for node in cluster.list_all_nodes()}


def test_slices_go_to_both_nodes_and_leave_the_same_rows(
    two_nodes: Cluster, jobs: Jobs, one_node: OneNode
) -> None:
    with PlacementWatch() as watch:
        features = jobs.cache()
    assert watch.raylets_with(OPERATOR) == raylets(two_nodes)
    assert features.keys() == one_node.features.keys()
    for tap, by_id in features.items():
        np.testing.assert_equal(by_id, one_node.features[tap])
    with PlacementWatch() as watch:
        digest = jobs.score_digest()
    assert watch.raylets_with(OPERATOR) == raylets(two_nodes)
    assert digest == one_node.score_digest


def test_two_workers_on_two_nodes_learn_what_one_does(
    two_nodes: Cluster, jobs: Jobs, one_node: OneNode
) -> None:
    with PlacementWatch() as watch:
        report = jobs.train(f"workers={{num_workers: 2, cpus_per_worker: {NUM_CPUS}}}")
    assert watch.raylets_with(TRAINER) == raylets(two_nodes)
    # The batch is that of the whole group: sums are taken in another order, and nothing else differs.
    for ours, theirs in zip(timeless(report["history"]), timeless(one_node.training["history"]), strict=True):
        for name, value in theirs.items():
            assert ours[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-4)), name
    assert report["top1"] == pytest.approx(one_node.training["top1"], abs=1 / 60)


def test_trials_run_side_by_side_on_both_nodes_and_end_alike(
    two_nodes: Cluster, jobs: Jobs, one_node: OneNode
) -> None:
    with PlacementWatch() as watch:
        trials = jobs.tune()
    assert watch.raylets_with(TRAINER) == raylets(two_nodes)
    assert trials == one_node.trials


def test_a_node_trains_on_what_another_one_prepares(
    two_nodes: Cluster, jobs: Jobs, one_node: OneNode
) -> None:
    with PlacementWatch() as watch:
        report = jobs.train(f"workers={{ingest: split, cpus_per_worker: {NUM_CPUS}}}")
    (trainer,) = watch.raylets_with(TRAINER)
    assert watch.raylets_with(PREPARER) & (raylets(two_nodes) - {trainer})
    assert timeless(report["history"]) == timeless(one_node.training["history"])
    assert report["model_digest"] == one_node.training["model_digest"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a device")
def test_work_for_a_gpu_goes_to_the_node_that_says_it_has_one(
    two_nodes: Cluster, with_gpu: int, jobs: Jobs, one_node: OneNode
) -> None:
    assert with_gpu in raylets(two_nodes)
    with PlacementWatch() as watch:
        refused = TrainJob(jobs.workspace(), TRAINING).start_here()
    assert watch.raylets_with(TRAINER) == {with_gpu}
    assert refused.returncode == 2
    assert "a GPU that PyTorch cannot use" in refused.stderr
    with PlacementWatch() as watch:
        digest = jobs.score_digest()
    assert watch.raylets_with(OPERATOR) == {with_gpu}
    assert digest == one_node.score_digest


@pytest.mark.chaos
def test_a_search_goes_on_when_another_node_takes_the_place_of_a_lost_one(jobs: Jobs) -> None:
    """The node is killed while a trial trains on it; the driver's own node has no CPUs."""
    settings = (*SETTINGS, "name=search", "base.strategy=from_scratch", f"base.epochs={MANY_EPOCHS}")
    settings += ("space.learning_rate={grid: [0.05, 0.02, 0.01]}", "base.checkpoint_steps=6")
    with running_nodes(0, NUM_CPUS, NUM_CPUS, system_config=HEALTH_CHECKS) as cluster:
        job = TuneJob(jobs.workspace(), settings, {"RAY_ADDRESS": cluster.address})
        lost = next(iter(cluster.worker_nodes))
        with PlacementWatch() as watch, begun(job) as process:
            wait_for(
                lambda: raylet_of(lost) in watch.raylets_with(TRAINER) and num_checkpoints(job) > 0, process
            )
            assert not job.records(), "a trial ended before the fault"
            cluster.remove_node(lost, allow_graceful=False)
            cluster.add_node(num_cpus=NUM_CPUS)
            stdout, stderr = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 0, stderr
    report = json.loads(stdout.splitlines()[-1])
    ends = [(trial["state"], trial["num_epochs"]) for trial in report["trials"]]
    assert ends == [("finished", MANY_EPOCHS)] * 3, report["trials"]
    assert_each_trial_ran_once(job)


def num_checkpoints(job: TuneJob) -> int:
    """Of all trainings of the search."""
    store = open_store(job.workspace)
    folders = TrainJob(job.workspace, ()).training_folders()
    return sum(len(checkpoint_records(store, folder.run_id)) for folder in folders)
