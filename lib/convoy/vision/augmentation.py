"""Augmentation: one drawn crop of an image, a pure function of the pixels, the policy and a random generator.

Called in many threads at once, so all randomness comes from the generator that is passed in, and torchvision's
kernels get their parameters from here.
"""

from __future__ import annotations

import numpy as np
import torch

from convoy.vision.augmentation_colour import (
    draw_colour_jitter,
    draw_colour_shift,
    draw_grey,
    draw_pca_colour,
)
from convoy.vision.augmentation_geometry import (
    draw_affine,
    draw_crop,
    draw_elastic,
    draw_erasing,
    draw_mirror,
    draw_perspective,
)
from convoy.vision.augmentation_policy import AugmentationPolicy
from convoy.vision.automatic_augmentation import draw_automatic
from convoy.vision.cropping import check_size
from convoy.vision.presets import EvalPreset


def augment(
    pixels_CHW: torch.Tensor,
    preset: EvalPreset,
    out_CHW: torch.Tensor,
    *,
    policy: AugmentationPolicy,
    rng: np.random.Generator,
) -> None:
    """Draw one augmented crop of an uint8 image into `out_CHW`, uint8 of shape (3, crop_px, crop_px).

    Takes `rng.random()` only. Training passes generator(seed, epoch, sample_id, repetition), cached views
    generator(seed, content_id, view). Raises SampleRejected (too small) for what the eval view rejects too,
    and ConfigError for a `pca_colour` without basis. `pixels_CHW` is left as it is.
    """
    policy.require_basis()
    check_size(pixels_CHW, preset)
    fill_C = [round(255 * mean) for mean in preset.mean]
    image_CHW = draw_crop(pixels_CHW, preset, policy.crop, rng)
    image_CHW = draw_mirror(image_CHW, policy.mirror, rng)
    image_CHW = draw_affine(image_CHW, policy.rotation, policy.shear, fill_C, rng)
    image_CHW = draw_perspective(image_CHW, policy.perspective, fill_C, rng)
    image_CHW = draw_elastic(image_CHW, policy.elastic, fill_C, rng)
    image_CHW = draw_automatic(image_CHW, policy.automatic, fill_C, rng)
    image_CHW = draw_colour_jitter(image_CHW, policy.colour_jitter, rng)
    image_CHW = draw_colour_shift(image_CHW, policy.colour_shift, rng)
    image_CHW = draw_pca_colour(image_CHW, policy.pca_colour, rng)
    image_CHW = draw_grey(image_CHW, policy.grey, rng)
    out_CHW.copy_(draw_erasing(image_CHW, policy.erasing, fill_C, rng))
