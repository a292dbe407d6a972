"""Whether our training step on our batches is a plain torch step on torchvision's images: the first losses."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.io import ImageReadMode, decode_image, read_file
from torchvision.transforms import v2
from train_job import Training, TrainJob, open_training, plain_sgd

from convoy.cluster.batch_feed import EpochOrder
from convoy.cluster.image_loading import BatchRequest, ImageLoader
from convoy.core.config import StrictModel, load_config
from convoy.core.errors import ConvoyError

# Losses are computed in float32.
MAX_RELATIVE_DIFFERENCE = 1e-5
_MAX_BATCH = 16


class LossEquality(StrictModel):
    """The mean loss of each of the first steps, ours and the plain loop's."""

    ours: list[float]
    plain: list[float]

    @property
    def max_relative_difference(self) -> float:
        """Of the losses of one step, over that of the plain loop."""
        pairs = zip(self.ours, self.plain, strict=True)
        return max(abs(one - other) / abs(other) for one, other in pairs)


class EqualitySettings(TrainJob):
    """How many updates are compared, and how far their losses may be apart, relatively."""

    steps: PositiveInt = 5
    tolerance: NonNegativeFloat = MAX_RELATIVE_DIFFERENCE


def compare_losses(settings: EqualitySettings) -> LossEquality:
    """The losses before each of the first updates: same weights, same order, no augmentation, in float64.

    Raises ConvoyError if they are further apart than the tolerance.
    """
    job = settings.model_copy(update={"batch_size": min(settings.batch_size, _MAX_BATCH)})
    training = open_training(job, augmentation="none", **{"recipe.precision": "fp32"})
    torch.set_num_threads(training.spec.num_threads)
    # Of the kernels of a GPU the fastest add in any order, and differ from themselves.
    torch.use_deterministic_algorithms(True, warn_only=True)
    # In float64, because in float32 no two ways agree for long: where a rounding error moves a value past zero in
    # a ReLU, or past its neighbour in a max-pool, a new ResNet-18 makes 1 % of it within three updates.
    training.network.double().register_forward_pre_hook(lambda _, images: (images[0].double(),))
    plain = copy.deepcopy(training.network)
    order = EpochOrder(training.spec, training.rows["label"].to_numpy(), rank=0, num_workers=1)
    steps = range(min(settings.steps, order.plan.num_steps))
    requests = [request for (request,) in order.requests(0, steps, training.spec.preset)]
    equality = LossEquality(
        ours=list(_our_losses(training, requests)),
        plain=list(_plain_losses(plain, training, settings, requests)),
    )
    # Written so that a loss that is no number does not pass.
    if not equality.max_relative_difference <= settings.tolerance:
        raise ConvoyError(f"unequal losses, so rates mean nothing: {equality!r}", where=settings.arch)
    return equality


def _our_losses(training: Training, requests: Sequence[BatchRequest]) -> Iterator[float]:
    loader, learner = ImageLoader(training.spec, training.rows), training.learner()
    for step, prepared in enumerate(loader.load(requests)):
        learner.begin_epoch()
        learner.step([prepared.batch], num_group_rows=len(prepared.batch.labels_B), factor=1.0, step=step)
        loss_sum, _, num_rows = learner.sums_3.tolist()
        yield loss_sum / num_rows


def _plain_losses(
    network: nn.Module, training: Training, job: TrainJob, requests: Sequence[BatchRequest]
) -> Iterator[float]:
    spec, device = training.spec, training.device
    network.to(device).train()
    optimiser = plain_sgd(training, network)
    transform = v2.Compose(
        [v2.Resize(spec.preset.resize_px, antialias=True), v2.CenterCrop(spec.preset.crop_px)]
    )
    mean_C11, std_C11 = (
        torch.tensor(values, device=device)[:, None, None] for values in (spec.preset.mean, spec.preset.std)
    )
    for request in requests:
        names = [training.rows["sample_id"][int(row)].as_py() for row in request.rows_B]
        pixels_BCHW = torch.stack([transform(_read(Path(job.images, name))) for name in names]).to(device)
        # Not v2.Normalize, whose order of operations rounds otherwise.
        images_BCHW = (pixels_BCHW / 255 - mean_C11) / std_C11
        labels_B = torch.from_numpy(training.rows["label"].to_numpy()[request.rows_B]).long()
        # In float32, as the learner's: a difference of 1e-7 is enough for that.
        loss = cross_entropy(network(images_BCHW).float(), labels_B.to(device))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        yield loss.item()


def _read(path: Path) -> Tensor:
    return decode_image(read_file(str(path)), mode=ImageReadMode.RGB)


if __name__ == "__main__":
    print(compare_losses(load_config(EqualitySettings, None, sys.argv[1:])).model_dump_json())
