"""The usual ways to ten crops: a DataLoader pass a network and crop, and one with TenCrop a network."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from enum import StrEnum
from functools import partial

import numpy as np
import torch
from dataloader import ImageFiles, Variant
from evaluate_job import NUM_VIEWS, CommitteeRates, EvaluateJob, save_joint
from PIL import Image
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from convoy.core.config import load_config
from convoy.vision.presets import IMAGENET_MEAN, IMAGENET_STD


class Way(StrEnum):
    """TTA_LOOP: every network sees every crop in a pass of its own, as fastai's `tta` does.

    TENCROP: every network sees all crops of a batch at once, folded into the batch, as torchvision's documentation
    of TenCrop shows.
    """

    TTA_LOOP = "tta_loop"
    TENCROP = "tencrop"


class DataLoaderSettings(EvaluateJob):
    """Worker processes of the loader (0: in the main process), and how the networks are run."""

    way: Way
    workers: int = Field(default=0, ge=0)
    variant: Variant = Variant.PLAIN


def run_dataloader(settings: DataLoaderSettings) -> CommitteeRates:
    """The rate of each committee over the passes of its networks, which are one after another and share nothing.

    Networks are built and warm before their passes begin.
    """
    num_images, num_networks = len(settings.paths), len(settings.archs)
    seconds, joint = [], []
    for place in range(num_networks):
        model = _Model(settings.network(place), settings.variant)
        model(torch.zeros(settings.batch_size, 3, settings.crop_px, settings.crop_px))
        started_s = time.perf_counter()
        passes = [np.concatenate(list(_run(model, loader))) for loader in _loaders(settings)]
        seconds.append(time.perf_counter() - started_s)
        joint.append(np.mean(passes, axis=0))
    save_joint(settings, np.mean(joint, axis=0))
    rates = {size: num_images / sum(seconds[:size]) for size in settings.sizes}
    return CommitteeRates(num_images=num_images, images_per_s=rates)


class _Model:
    """A network that averages the probabilities of the crops in its batches."""

    def __init__(self, network: nn.Module, variant: Variant) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        is_tuned = variant is Variant.TUNED
        self._memory_format = torch.channels_last if is_tuned else torch.contiguous_format
        self._network = network.to(self._device, memory_format=self._memory_format)
        self._autocast = torch.autocast(self._device.type, torch.bfloat16, enabled=is_tuned)

    def __call__(self, images: Tensor) -> np.ndarray:
        """The probabilities_BK of images of shape (B, 3, H, W) or (B, crops, 3, H, W)."""
        images_BCHW = images.reshape(-1, *images.shape[-3:]).to(
            self._device, memory_format=self._memory_format
        )
        with torch.inference_mode(), self._autocast:
            logits = self._network(images_BCHW).double()
            means_BK = logits.softmax(dim=1).unflatten(0, (len(images), -1)).mean(dim=1)
        return means_BK.cpu().numpy()


def _run(model: _Model, loader: DataLoader[Tensor]) -> Iterator[np.ndarray]:
    for images in loader:
        yield model(images)


def _loaders(settings: DataLoaderSettings) -> Iterator[DataLoader[Tensor]]:
    if settings.way is Way.TENCROP:
        yield _loader(settings, partial(_all_crops, crop_px=settings.crop_px))
        return
    for view in range(NUM_VIEWS):
        yield _loader(settings, partial(_one_crop, crop_px=settings.crop_px, view=view))


def _loader(settings: DataLoaderSettings, choose: Callable[[Image.Image], Tensor]) -> DataLoader[Tensor]:
    transform = v2.Compose([v2.Resize(settings.preset.resize_px), choose])
    return DataLoader(
        ImageFiles(settings.paths, transform),
        settings.batch_size,
        num_workers=settings.workers,
        pin_memory=torch.cuda.is_available(),
    )


def _all_crops(image: Image.Image, *, crop_px: int) -> Tensor:
    return torch.stack([_normalised(crop) for crop in v2.functional.ten_crop(image, crop_px)])


def _one_crop(image: Image.Image, *, crop_px: int, view: int) -> Tensor:
    """The crop of that place among the ten."""
    is_mirrored, place = divmod(view, NUM_VIEWS // 2)
    shown = v2.functional.horizontal_flip(image) if is_mirrored else image
    return _normalised(v2.functional.five_crop(shown, crop_px)[place])


def _normalised(image: Image.Image) -> Tensor:
    pixels = v2.functional.to_dtype(v2.functional.pil_to_tensor(image), torch.float32, scale=True)
    return v2.functional.normalize(pixels, IMAGENET_MEAN, IMAGENET_STD)


if __name__ == "__main__":
    print(run_dataloader(load_config(DataLoaderSettings, None, sys.argv[1:])).model_dump_json())
