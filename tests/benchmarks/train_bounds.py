"""What a training could reach at most: the very same step on a batch in memory, and the loader without a step."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from itertools import islice

from train_job import Training, TrainJob, open_training

from convoy.cluster.batch_feed import EpochOrder, FusedFeed
from convoy.cluster.image_loading import ImageLoader, PreparedBatch
from convoy.core.config import StrictModel, load_config
from convoy.core.processes import keep_freed_memory
from convoy.vision.forward import use_threads

_WARM_UP_STEPS = 3


class TrainBounds(StrictModel):
    """Images per second. `mock_loader`: `Learner.step` on one batch, over and over. `loader`: batches alone,
    prepared in threads of one process. `num_threads` is what both had.
    """

    mock_loader: float
    loader: float
    precision: str
    num_threads: int
    device: str

    @property
    def combined(self) -> float:
        """The rate when step and loader share the cores; beside a GPU that of the step: others prepare its images."""
        if self.device != "cpu":
            return self.mock_loader
        return 1 / (1 / self.mock_loader + 1 / self.loader)


def measure_bounds(job: TrainJob) -> TrainBounds:
    """Both rates in one process, each over as many images as the job's steady epochs have."""
    training = open_training(job)
    keep_freed_memory()
    use_threads(training.spec.num_threads)
    order = EpochOrder(training.spec, training.rows["label"].to_numpy(), rank=0, num_workers=1)
    num_steps = (job.epochs - 1) * order.plan.num_steps
    batches = _batches(training, order, job.epochs)
    first = next(batches)
    for _ in range(_WARM_UP_STEPS - 1):
        next(batches)
    num_images, started_s = 0, time.perf_counter()
    for one in islice(batches, num_steps):
        num_images += len(one.batch.labels_B)
    loader_rate = num_images / (time.perf_counter() - started_s)
    batches.close()
    return TrainBounds(
        mock_loader=_mock_rate(training, first, num_steps),
        loader=loader_rate,
        precision=training.spec.recipe.precision.value,
        num_threads=training.spec.num_threads,
        device=training.device.type,
    )


def _batches(training: Training, order: EpochOrder, epochs: int) -> Iterator[PreparedBatch]:
    """The batches of the training, from the loader of its worker."""
    loader = ImageLoader(training.spec, training.rows, pin_memory=training.device.type == "cuda")
    feed = FusedFeed(order, loader, None)
    for epoch in range(epochs + 1):
        for passes in feed.steps(epoch, 0, training.spec.preset):
            yield from passes


def _mock_rate(training: Training, prepared: PreparedBatch, num_steps: int) -> float:
    learner, num_rows = training.learner(), len(prepared.batch.labels_B)

    def run_steps(numbers: range) -> None:
        for number in numbers:
            learner.step([prepared.batch], num_group_rows=num_rows, factor=1.0, step=number)
        # As an epoch does at its end: waits for the device.
        learner.sums_3.tolist()

    run_steps(range(_WARM_UP_STEPS))
    started_s = time.perf_counter()
    run_steps(range(num_steps))
    return num_steps * num_rows / (time.perf_counter() - started_s)


if __name__ == "__main__":
    print(measure_bounds(load_config(TrainJob, None, sys.argv[1:])).model_dump_json())
