"""The images that an exported file is checked on: of a dataset's held-out split, or random pixels."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from convoy.core.batching import batched
from convoy.core.errors import DataError
from convoy.core.records import SampleRejected, Split
from convoy.pipelines.stratified_sample import evenly_spread_rows
from convoy.storage.manifests import Manifest
from convoy.storage.samples import SampleReader
from convoy.vision.augmentation_policy import EVAL_VIEW
from convoy.vision.decode_rule import DecodeRule
from convoy.vision.decoding import decode_image
from convoy.vision.presets import EvalPreset
from convoy.vision.views import prepare_view

_BATCH_IMAGES = 16
_SEED = 0


def batches_of_two_sizes(images: Iterator[Tensor]) -> Iterator[Tensor]:
    """Images_BCHW of images_CHW: the first alone, the others together, as a file must take any number of them."""
    for first in islice(images, 1):
        yield torch.stack([first])
    for batch in batched(images, _BATCH_IMAGES):
        yield torch.stack(batch)


def random_images(size_px: int, num_images: int) -> Iterator[Tensor]:
    """Uint8 images_CHW of random pixels, the same in every call."""
    random = np.random.default_rng(_SEED)
    for _ in range(num_images):
        yield torch.from_numpy(random.integers(0, 256, (3, size_px, size_px), np.uint8))


def held_out_images(
    manifest: Manifest, rule: DecodeRule, preset: EvalPreset, num_images: int
) -> Iterator[Tensor]:
    """The eval view, uint8 images_CHW, of samples spread evenly over the held-out split; rejects are left out.

    Raises DataError where there is no such split, or no usable image among the chosen ones.
    """
    split = images_split(manifest)
    if split not in manifest.counts:
        raise DataError(
            "the dataset has no held-out split",
            where=manifest.uri,
            next_step="leave --dataset out to check on random pixels",
        )
    rows = evenly_spread_rows(manifest, num_images, splits=[split])
    content_ids = rows["content_id"].to_pylist()
    num_usable = 0
    for row, data in SampleReader(max_bytes=rule.max_bytes).read(rows):
        try:
            image_CHW = _eval_view(data, rule, preset, content_ids[row])
        except SampleRejected:
            continue
        num_usable += 1
        yield image_CHW
    if not num_usable:
        raise DataError(
            "none of the images to check the file on can be used",
            where=manifest.uri,
            next_step="look at the rejects of an evaluation, or leave --dataset out to check on random pixels",
        )


def _eval_view(
    data: bytes | SampleRejected, rule: DecodeRule, preset: EvalPreset, content_id: bytes
) -> Tensor:
    if isinstance(data, SampleRejected):
        raise data
    image_CHW = torch.empty(3, preset.crop_px, preset.crop_px, dtype=torch.uint8)
    pixels_CHW = decode_image(data, rule).pixels_CHW
    prepare_view(pixels_CHW, preset, image_CHW, view=EVAL_VIEW, policy=None, content_id=content_id)
    return image_CHW


def images_split(manifest: Manifest) -> Split:
    """The split whose images are taken: test, or val where there is no test. Labels are not asked for."""
    return Split.TEST if Split.TEST in manifest.counts else Split.VAL
