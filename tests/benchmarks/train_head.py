"""One pass of a head's training over the images: on cached features, and through the frozen body."""

from __future__ import annotations

import sys

from measuring import convoy
from train_job import TrainJob

from convoy.core.config import StrictModel, load_config
from convoy.core.errors import ConvoyError
from convoy.core.training_events import EpochResult

_PASSES_THROUGH_BODY = 2


class HeadEpochs(StrictModel):
    """Seconds of one pass over the `num_rows` training images.

    `cached_s`: the fit on cached features over its number of passes, reading them included. `network_s`: the
    head phase of a fine-tuning through the frozen body, its first epoch left out.
    """

    num_rows: int
    num_passes: int
    cached_s: float
    network_s: float

    @property
    def speedup(self) -> float:
        """How many times as long the pass through the body takes."""
        return self.network_s / self.cached_s


def measure_head_epochs(job: TrainJob) -> HeadEpochs:
    """Both from jobs as a user runs them, on the same images without augmentation."""
    # One C: several would need validation rows to choose by.
    probe = _train(job, strategy="linear_probe", name="bench-probe", head="{C: [0.1]}")
    phases = f"[{{name: head, epochs: {_PASSES_THROUGH_BODY}, freeze_depth: body, learning_rate: 0.1}}]"
    tuned = _train(
        job, strategy="fine_tune", name="bench-head", head_source="network", phases=phases, epochs="null"
    )
    epochs = [EpochResult.model_validate(epoch) for epoch in tuned["history"]][1:]
    head = probe["head"]
    if {epoch.images for epoch in epochs} != {head["num_rows"]}:
        raise ConvoyError("the two jobs did not train on the same images", where=job.dataset)
    return HeadEpochs(
        num_rows=head["num_rows"],
        num_passes=head["num_passes"],
        cached_s=head["fit_seconds"] / head["num_passes"],
        network_s=sum(epoch.seconds for epoch in epochs) / len(epochs),
    )


def _train(job: TrainJob, **changed: str) -> dict[str, object]:
    overrides = job.overrides(**changed, augmentation="none", **{"backbone.weights": "random"})
    settings = [argument for override in overrides for argument in ("--set", override)]
    return convoy("train", "--workspace", job.workspace, "--new-run", *settings)


if __name__ == "__main__":
    job = load_config(TrainJob, None, sys.argv[1:])
    print(measure_head_epochs(job).model_dump_json())
