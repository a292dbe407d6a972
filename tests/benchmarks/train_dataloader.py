"""torchvision's reference training (references/classification/train.py): ImageFolder, DataLoader, train_one_epoch."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from dataloader import Variant
from measuring import RateResult
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from train_job import CROP, TrainJob, open_training, plain_sgd
from train_ours import steady_rate

from convoy.core.config import load_config
from convoy.vision.presets import IMAGENET_MEAN, IMAGENET_STD


class ReferenceSettings(TrainJob):
    """Worker processes of the loader (0: in the main process), and how the network is run."""

    workers: int = Field(default=0, ge=0)
    variant: Variant = Variant.PLAIN


def run_reference(settings: ReferenceSettings) -> RateResult:
    """The steady rate is that of all epochs but the first, each from the start of its loader to its last step."""
    launched_s = time.monotonic()
    training = open_training(settings)
    network = training.network.to(training.device, memory_format=_memory_format(settings.variant))
    optimiser, criterion, loader = plain_sgd(training, network), nn.CrossEntropyLoss(), _loader(settings)
    epochs = []
    for _ in range(settings.epochs):
        started_s = time.perf_counter()
        num_images = _train_one_epoch(
            network, criterion, optimiser, loader, training.device, settings.variant
        )
        epochs.append((num_images, time.perf_counter() - started_s))
    return RateResult(
        num_images=sum(num_images for num_images, _ in epochs),
        images_per_s=steady_rate(epochs),
        wall_s=time.monotonic() - launched_s,
    )


def _loader(settings: ReferenceSettings) -> DataLoader[tuple[Tensor, int]]:
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(settings.crop_px, scale=CROP.area, ratio=CROP.aspect, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    return DataLoader(
        ImageFolder(str(Path(settings.images, "train")), transform),
        batch_size=settings.batch_size,
        shuffle=True,
        num_workers=settings.workers,
        pin_memory=torch.cuda.is_available(),
        # So that starting them does not count in every epoch.
        persistent_workers=settings.workers > 0,
    )


def _train_one_epoch(
    network: nn.Module,
    criterion: nn.Module,
    optimiser: torch.optim.Optimizer,
    loader: DataLoader[tuple[Tensor, int]],
    device: torch.device,
    variant: Variant,
) -> int:
    network.train()
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=variant is Variant.TUNED)
    losses, num_images = [], 0
    for images_BCHW, targets_B in loader:
        images = images_BCHW.to(device, non_blocking=True, memory_format=_memory_format(variant))
        targets = targets_B.to(device, non_blocking=True)
        with autocast:
            loss = criterion(network(images), targets)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
        num_images += len(targets)
    # Waits for the device.
    torch.stack(losses).mean().item()
    return num_images


def _memory_format(variant: Variant) -> torch.memory_format:
    return torch.channels_last if variant is Variant.TUNED else torch.contiguous_format


if __name__ == "__main__":
    print(run_reference(load_config(ReferenceSettings, None, sys.argv[1:])).model_dump_json())
