"""A small fine-tuning that chaos tests disturb, and how to catch it in the middle."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import ray

from command_lines import TIMEOUT_S
from convoy.storage.checkpoints import CheckpointRecord
from train_jobs import LENET, TrainJob
from tune_jobs import TuneJob

STEPS_AN_EPOCH = 6
EPOCHS = {"head": 3, "body": 17}
NUM_STEPS = STEPS_AN_EPOCH * sum(EPOCHS.values())
CHECKPOINT_STEPS = 4
# In the middle of the first phase's second epoch, and of the first epoch of the second phase.
IN_HEAD_PHASE = STEPS_AN_EPOCH + 2
IN_BODY_PHASE = STEPS_AN_EPOCH * EPOCHS["head"] + 2
# What the second phase leaves as it was: the stage c1.
FROZEN = ("c1.weight", "c1.bias", "s2.weight", "s2.bias")
SETTINGS = (
    "name=tuned",
    "strategy=fine_tune",
    f"backbone={LENET}",
    "head_source=network",
    "phases=["
    f"{{name: head, epochs: {EPOCHS['head']}, freeze_depth: body, learning_rate: 0.1}}, "
    f"{{name: body, epochs: {EPOCHS['body']}, freeze_depth: c1, learning_rate: 0.05, body_rate: 0.5}}]",
    "recipe={batch_size: 16, precision: fp32, averaging: ema, ema_decay: 0.95}",
    "extraction={precision: fp32}",
    "workers={cpus_per_worker: 1}",
    f"checkpoint_steps={CHECKPOINT_STEPS}",
)


def made_training(workspace: str, folder: Path, address: str) -> TrainJob:
    """The job on a copy of a workspace that has only the dataset, for the Ray at an address."""
    copy = shutil.copytree(workspace, folder / "workspace")
    return TrainJob(str(copy), SETTINGS, {"RAY_ADDRESS": address})


@contextmanager
def connected(address: str, environment: Mapping[str, str] | None = None) -> Iterator[None]:
    """This process as a driver of a Ray, whose workers for it have these variables in their environment."""
    ray.init(
        address,
        logging_level=logging.ERROR,
        log_to_driver=False,
        runtime_env={"env_vars": dict(environment or {})},
    )
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def begun(job: TrainJob | TuneJob) -> Iterator[subprocess.Popen[str]]:
    """The command in a process of its own, which does not outlive the test."""
    process = subprocess.Popen(
        job.command(),
        env={**os.environ, **job.environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def step_of(checkpoint: CheckpointRecord) -> int:
    """Steps from the start of the training up to a checkpoint, as its position says."""
    position = checkpoint.details["position"]
    epochs = position["epoch"] + (EPOCHS["head"] if position["phase"] else 0)
    return int(epochs * STEPS_AN_EPOCH + position["step"])


def wait_for_checkpoint(job: TrainJob, at_step: int, process: subprocess.Popen[str]) -> None:
    """Return as soon as a checkpoint of that step or a later one counts."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while not any(step_of(one) >= at_step for one in job.checkpoints()):
        assert process.poll() is None, "the training ended before the fault"
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def wait_until_quiet(job: TrainJob) -> None:
    """Until no worker of a dead driver writes checkpoints any more."""
    keys: list[str] | None = None
    while keys != (now := [one.key for one in job.checkpoints()]):
        keys = now
        time.sleep(1)
