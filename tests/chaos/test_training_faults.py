"""Faults in the middle of a training; then the same weights as without the fault, or an error that says what is kept.

One job is disturbed in every way: a fine-tuning with a moving average, in a phase for the head and one for the body.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.cluster_utils import Cluster

from chaos_jobs import FaultTable
from command_lines import TIMEOUT_S, last_json
from convoy.core.crash_points import CrashPoint
from convoy.storage.bundles import open_bundle
from convoy.storage.stores import open_store
from convoy.vision.weights import read_state_dict
from crash_point_sets import TRAINING_CRASH_POINTS
from train_jobs import NUM_ROWS, TrainJob, frozen_digits, timeless
from training_faults import (
    CHECKPOINT_STEPS,
    FROZEN,
    IN_BODY_PHASE,
    IN_HEAD_PHASE,
    NUM_STEPS,
    STEPS_AN_EPOCH,
    begun,
    connected,
    made_training,
    step_of,
    wait_for_checkpoint,
    wait_until_quiet,
)

pytestmark = [pytest.mark.integration, pytest.mark.chaos, pytest.mark.slow]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A Ray that outlives the drivers that are killed."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A workspace that has the dataset, and nothing else; every job gets a copy."""
    return frozen_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def new_job(workspace: str, cluster: Cluster) -> Callable[[Path], TrainJob]:
    return lambda folder: made_training(workspace, folder, cluster.address)


@pytest.fixture
def job(new_job: Callable[[Path], TrainJob], tmp_path: Path) -> TrainJob:
    return new_job(tmp_path)


@pytest.fixture(scope="module")
def undisturbed(
    new_job: Callable[[Path], TrainJob], cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The report of the job without a fault."""
    with connected(cluster.address):
        return new_job(tmp_path_factory.mktemp("undisturbed")).run_here()


def assert_same_training(report: dict[str, Any], undisturbed: dict[str, Any]) -> None:
    assert report["bundle"] == undisturbed["bundle"]
    assert timeless(report["history"]) == timeless(undisturbed["history"])
    assert report["train_rejects"] == undisturbed["train_rejects"]


def assert_frozen_stayed(job: TrainJob, report: dict[str, Any]) -> None:
    store = open_store(job.workspace)
    (folder,) = job.training_folders()
    initial = read_state_dict(store.get(folder.key("initial.safetensors")).data)
    final = read_state_dict(open_bundle(store, report["bundle"]).files["model.safetensors"])
    moved = {name for name in initial if not torch.equal(initial[name], final[f"backbone.{name}"])}
    assert moved == initial.keys() - set(FROZEN)


def kill_driver(job: TrainJob, at_step: int) -> None:
    """Start the command, and SIGKILL its process once a checkpoint of that step counts."""
    with begun(job) as process:
        wait_for_checkpoint(job, at_step, process)
        process.kill()
        assert process.wait(TIMEOUT_S) == -signal.SIGKILL
    wait_until_quiet(job)
    (folder,) = job.training_folders()
    assert not Path(job.workspace, folder.key("trained.json")).exists(), "the training ended before the fault"


@pytest.mark.parametrize("point", sorted(TRAINING_CRASH_POINTS))
def test_a_killed_worker_is_replaced_and_the_training_goes_on(
    point: CrashPoint,
    job: TrainJob,
    cluster: Cluster,
    undisturbed: dict[str, Any],
    tmp_path: Path,
    fault_table: FaultTable,
) -> None:
    nth = {
        CrashPoint.TRAINING_STEP: IN_BODY_PHASE + CHECKPOINT_STEPS,
        CrashPoint.CHECKPOINT_WRITTEN: 3,
        CrashPoint.CHECKPOINT_RECORDED: 2,
    }.get(point, 1)
    arrivals = tmp_path / "arrivals"
    with connected(cluster.address, {"CONVOY_CRASH_POINT": f"{point}:{nth}:{arrivals}"}):
        finished = job.start_here()
    assert arrivals.stat().st_size >= nth, "the fault did not fire"
    assert finished.returncode == 0, finished.stderr
    assert "going on from the checkpoint of step" in finished.stderr
    report = last_json(finished)
    assert_same_training(report, undisturbed)
    assert_frozen_stayed(job, report)
    fault_table.add_training(f"F1 worker killed at {point.value}, train", (report, undisturbed))


DRIVER_POINTS = {
    CrashPoint.RUN_OPENED: 1,
    CrashPoint.RUN_RECORDED: 1,
    # The third run that ends is the training, after its features and its predictions.
    CrashPoint.SUCCESS_WRITTEN: 3,
    CrashPoint.RUN_CLOSED: 3,
}


@pytest.mark.slow
@pytest.mark.parametrize("point", DRIVER_POINTS)
def test_a_driver_killed_at_a_step_of_its_own_resumes(
    point: CrashPoint,
    job: TrainJob,
    undisturbed: dict[str, Any],
    tmp_path: Path,
    fault_table: FaultTable,
) -> None:
    arrivals = tmp_path / "arrivals"
    fault = {"CONVOY_CRASH_POINT": f"{point}:{DRIVER_POINTS[point]}:{arrivals}"}
    disturbed = replace(job, environment={**job.environment, **fault})
    killed = disturbed.start()
    assert arrivals.stat().st_size == DRIVER_POINTS[point], "the fault did not fire"
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    report = disturbed.run()
    assert_same_training(report, undisturbed)
    fault_table.add_training(f"F2 driver killed at {point.value}, train", (report, undisturbed))


@pytest.mark.parametrize("at_step", [IN_HEAD_PHASE, IN_BODY_PHASE])
def test_a_training_whose_driver_was_killed_goes_on_with_the_same_command(
    at_step: int, job: TrainJob, cluster: Cluster, undisturbed: dict[str, Any]
) -> None:
    kill_driver(job, at_step)
    newest = job.checkpoints()[0]
    assert at_step <= step_of(newest) < NUM_STEPS
    with connected(cluster.address):
        finished = job.start_here()
    assert finished.returncode == 0, finished.stderr
    assert f"going on from the checkpoint of step {newest.step}" in finished.stderr
    report = last_json(finished)
    assert_same_training(report, undisturbed)
    assert_frozen_stayed(job, report)


def killed_in_the_middle(job: TrainJob, cluster: Cluster, arrivals: Path) -> None:
    """Let the worker die in the second phase, and the command with it, as no restart is allowed."""
    nth = IN_BODY_PHASE + CHECKPOINT_STEPS
    with connected(cluster.address, {"CONVOY_CRASH_POINT": f"{CrashPoint.TRAINING_STEP}:{nth}:{arrivals}"}):
        finished = job.changed("workers.max_failures=0").start_here()
    assert arrivals.stat().st_size == nth, "the fault did not fire"
    assert finished.returncode == 1
    assert "run the same command again to go on" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_a_damaged_newest_checkpoint_costs_steps_and_changes_nothing(
    job: TrainJob,
    cluster: Cluster,
    undisturbed: dict[str, Any],
    tmp_path: Path,
    fault_table: FaultTable,
) -> None:
    killed_in_the_middle(job, cluster, tmp_path / "arrivals")
    # A third one, where the worker died before it was deleted.
    newest, before, *_ = job.checkpoints()
    path = Path(job.workspace, newest.key)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with connected(cluster.address):
        finished = job.start_here()
    assert finished.returncode == 0, finished.stderr
    assert f"checkpoint of step {newest.step} cannot be used: " in finished.stderr
    assert f"going on from the checkpoint of step {before.step}" in finished.stderr
    report = last_json(finished)
    assert_same_training(report, undisturbed)
    fault_table.add_training("F27 newest checkpoint damaged, train", (report, undisturbed))


def test_a_training_that_diverges_ends_with_the_step_and_keeps_finite_checkpoints(
    job: TrainJob, cluster: Cluster, fault_table: FaultTable
) -> None:
    wild = job.changed(
        "phases=[{name: calm, epochs: 1, learning_rate: 0.01}, {name: wild, epochs: 9, learning_rate: 1.0e+38}]"
    )
    with connected(cluster.address):
        finished = wild.start_here()
    assert (finished.returncode, finished.stdout) == (1, "")
    assert "the loss or a weight is no finite number any more" in finished.stderr
    assert "checkpoints/, phase wild, epoch 2 of 10, step " in finished.stderr
    assert "lower learning_rate" in finished.stderr
    assert not Path(job.workspace, "models", "tuned").exists()
    checkpoints = wild.checkpoints()
    assert checkpoints
    for checkpoint in checkpoints:
        tensors = read_state_dict(open_store(job.workspace).get(checkpoint.key).data)
        assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    fault_table.add_training("F30 loss is no number, train", None)


@contextmanager
def unwritable(folder: Path) -> Iterator[None]:
    """Nothing can be written to a folder, whose files can still be read; root needs a file system that helps."""
    commands = (
        (["chattr", "+i"], ["chattr", "-i"]) if os.geteuid() == 0 else (["chmod", "a-w"], ["chmod", "u+w"])
    )
    closing, opening = ([*command, str(folder)] for command in commands)
    subprocess.run(closing, check=False, capture_output=True)
    try:
        (folder / "probe").touch()
    except PermissionError:
        pass
    else:
        (folder / "probe").unlink()
        pytest.skip("no way to make a folder unwritable for this user on this file system")
    try:
        yield
    finally:
        subprocess.run(opening, check=True)


def test_a_store_that_fails_in_the_middle_keeps_the_last_good_checkpoint(
    job: TrainJob, cluster: Cluster, undisturbed: dict[str, Any]
) -> None:
    once_again = job.changed("workers.max_failures=1")
    with begun(once_again) as process:
        wait_for_checkpoint(job, IN_HEAD_PHASE, process)
        (folder,) = job.training_folders()
        with unwritable(Path(job.workspace, folder.key("checkpoints"))):
            good = job.checkpoints()[0]
            stdout, stderr = process.communicate(timeout=TIMEOUT_S)
            assert step_of(good) < NUM_STEPS, "the training ended before the fault"
            assert (process.returncode, stdout) == (1, "")
            assert "permission denied" in stderr
            assert folder.key("checkpoints") in stderr
            # It was tried again, from what was there.
            assert f"going on from the checkpoint of step {good.step}" in stderr
            assert job.checkpoints()[0] == good
    with connected(cluster.address):
        finished = job.start_here()
    assert finished.returncode == 0, finished.stderr
    assert f"going on from the checkpoint of step {good.step}" in finished.stderr
    assert_same_training(last_json(finished), undisturbed)


def test_what_is_wrong_with_the_data_is_not_tried_again(cluster: Cluster, tmp_path: Path) -> None:
    """A restart heals no image: the second group of workers only says what the first one found."""
    workspace = frozen_digits(tmp_path / "digits")
    for image in (tmp_path / "digits" / "images" / "train").rglob("*.jpg"):
        image.write_bytes(b"not an image any more")
    job = made_training(workspace, tmp_path / "job", cluster.address)
    arrivals = tmp_path / "arrivals"
    # Nobody comes so far: the crash point only counts.
    counted = {"CONVOY_CRASH_POINT": f"{CrashPoint.TRAINING_STEP}:1000:{arrivals}"}
    with connected(cluster.address, counted):
        finished = job.start_here()
    assert finished.returncode == 1
    assert f"none of {NUM_ROWS['train']} training images could be used" in finished.stderr
    assert arrivals.stat().st_size == STEPS_AN_EPOCH
