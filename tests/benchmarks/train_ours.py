"""Convoy, as a user runs it: `convoy train` from scratch."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from measuring import RateResult, convoy
from train_job import TrainJob

from convoy.core.config import load_config
from convoy.core.training_events import EpochResult


def run_ours(job: TrainJob) -> RateResult:
    """The steady rate is that of all epochs but the first, each from its start to its last step.

    `wall_s` is the whole job: start of Ray, all epochs, evaluation and bundle.
    """
    launched_s = time.monotonic()
    settings = [argument for override in job.overrides() for argument in ("--set", override)]
    report = convoy("train", "--workspace", job.workspace, "--new-run", *settings)
    history = [EpochResult.model_validate(epoch) for epoch in report["history"]]
    return RateResult(
        num_images=sum(epoch.images for epoch in history),
        images_per_s=steady_rate([(epoch.images, epoch.seconds) for epoch in history]),
        wall_s=time.monotonic() - launched_s,
        details={
            "wait_share": sum(epoch.wait_s for epoch in history[1:])
            / sum(epoch.seconds for epoch in history[1:]),
            "epochs": [epoch.model_dump(include={"images_per_s", "wait_s", "seconds"}) for epoch in history],
        },
    )


def steady_rate(epochs: Sequence[tuple[int, float]]) -> float:
    """Images per second over (images, seconds) of all epochs but the first, which warms up."""
    return sum(images for images, _ in epochs[1:]) / sum(seconds for _, seconds in epochs[1:])


if __name__ == "__main__":
    print(run_ours(load_config(TrainJob, None, sys.argv[1:])).model_dump_json())
