"""The kinds of augmentation that change colours. Images are uint8 of shape (3, height, width), never changed in
place; a section that is None leaves the image as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torchvision.transforms.v2 import functional

from convoy.vision.augmentation_policy import ColourJitter, ColourShift, Grey, PcaBasis, PcaColour
from convoy.vision.draws import either_way, happens, normal, shuffled, uniform


def draw_colour_jitter(
    image_CHW: torch.Tensor, section: ColourJitter | None, rng: np.random.Generator
) -> torch.Tensor:
    """Other brightness, contrast, saturation and hue, in random order, as in torchvision's ColorJitter."""
    if section is None or not happens(rng, section.probability):
        return image_CHW
    steps: list[Callable[[torch.Tensor], torch.Tensor]] = []
    if section.brightness:
        factor = _factor(rng, section.brightness)
        steps.append(partial(functional.adjust_brightness, brightness_factor=factor))
    if section.contrast:
        factor = _factor(rng, section.contrast)
        steps.append(partial(functional.adjust_contrast, contrast_factor=factor))
    if section.saturation:
        factor = _factor(rng, section.saturation)
        steps.append(partial(functional.adjust_saturation, saturation_factor=factor))
    if section.hue:
        steps.append(partial(functional.adjust_hue, hue_factor=either_way(rng, section.hue)))
    for step in shuffled(rng, steps):
        image_CHW = step(image_CHW)
    return image_CHW


def draw_colour_shift(
    image_CHW: torch.Tensor, section: ColourShift | None, rng: np.random.Generator
) -> torch.Tensor:
    """The image with a constant added to each channel."""
    if section is None or not happens(rng, section.probability):
        return image_CHW
    return shift_colours(image_CHW, np.array([either_way(rng, section.levels) for _ in range(3)]))


def draw_pca_colour(
    image_CHW: torch.Tensor, section: PcaColour | None, rng: np.random.Generator
) -> torch.Tensor:
    """The image in another light: shifted along the principal colours of its dataset."""
    if section is None or section.basis is None or not happens(rng, section.probability):
        return image_CHW
    alphas_3 = np.array([section.strength * normal(rng) for _ in range(3)])
    return shift_colours(image_CHW, pca_shift(section.basis, alphas_3))


def draw_grey(image_CHW: torch.Tensor, section: Grey | None, rng: np.random.Generator) -> torch.Tensor:
    """The image, or its luma in all channels (ITU-R 601)."""
    if section is None or not happens(rng, section.probability):
        return image_CHW
    grey_CHW: torch.Tensor = functional.rgb_to_grayscale(image_CHW, num_output_channels=3)
    return grey_CHW


def pca_shift(basis: PcaBasis, alphas_3: np.ndarray) -> np.ndarray:
    """What is added to each channel, in levels of 0..255: 255 [p1 p2 p3] [alpha1 lambda1, …]^T.

    Krizhevsky et al. 2012, section 4.1. The eigenvalues count for pixels in 0..1, where a strength of 0.1
    means a few levels; for pixels in 0..255 they would be 65,025 times larger, and white or black the result.
    """
    components_33 = np.array(basis.eigenvectors).T
    shift_3: np.ndarray = 255 * components_33 @ (alphas_3 * np.array(basis.eigenvalues))
    return shift_3


def shift_colours(image_CHW: torch.Tensor, levels_3: np.ndarray) -> torch.Tensor:
    """The image plus a number of levels a channel, rounded and clipped to 0..255."""
    levels_C11 = torch.from_numpy(levels_3.astype(np.float32)).view(3, 1, 1)
    return image_CHW.add(levels_C11).round_().clamp_(0, 255).to(torch.uint8)


def _factor(rng: np.random.Generator, strength: float) -> float:
    return uniform(rng, max(0.0, 1 - strength), 1 + strength)
