"""The kinds of augmentation that move or cover pixels. Images are uint8 of shape (3, height, width), never changed
in place; a section that is None leaves the image as it is. `fill_C` is the colour of borders, in 0..255.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from convoy.core.crops import Box, random_resized_crop_box
from convoy.vision.augmentation_policy import (
    Crop,
    CropKind,
    Elastic,
    Erasing,
    Mirror,
    Padding,
    Perspective,
    Rotation,
    Shear,
)
from convoy.vision.cropping import cut, eval_crop, eval_resized, resize
from convoy.vision.draws import below, either_way, happens, uniform
from convoy.vision.presets import EvalPreset


def draw_crop(
    pixels_CHW: torch.Tensor, preset: EvalPreset, crop: Crop, rng: np.random.Generator
) -> torch.Tensor:
    """A crop of crop_px x crop_px of an image that is large enough for the preset."""
    if crop.kind is CropKind.EVAL:
        return eval_crop(pixels_CHW, preset)
    if crop.kind is CropKind.RANDOM:
        return _random_crop(eval_resized(pixels_CHW, preset), preset.crop_px, crop, rng)
    box = random_resized_crop_box(*pixels_CHW.shape[1:], area=crop.area, aspect=crop.aspect, rng=rng)
    return resize(cut(pixels_CHW, box), (preset.crop_px, preset.crop_px), preset.interpolation)


def draw_mirror(image_CHW: torch.Tensor, section: Mirror | None, rng: np.random.Generator) -> torch.Tensor:
    """The image, or its mirror image."""
    if section is None or not happens(rng, section.probability):
        return image_CHW
    return image_CHW.flip(-1)


def draw_affine(
    image_CHW: torch.Tensor,
    rotation: Rotation | None,
    shear: Shear | None,
    fill_C: Sequence[int],
    rng: np.random.Generator,
) -> torch.Tensor:
    """The image slanted and turned about its centre, resampled once for both."""
    rotation_degrees = shear_degrees = 0.0
    if rotation is not None and happens(rng, rotation.probability):
        rotation_degrees = either_way(rng, rotation.degrees)
    if shear is not None and happens(rng, shear.probability):
        shear_degrees = either_way(rng, shear.degrees)
    return warp_affine(
        image_CHW, rotation_degrees=rotation_degrees, shear_degrees=shear_degrees, fill_C=fill_C
    )


def warp_affine(
    image_CHW: torch.Tensor,
    *,
    rotation_degrees: float = 0.0,
    shear_degrees: float = 0.0,
    shift_px: tuple[float, float] = (0.0, 0.0),
    fill_C: Sequence[int],
) -> torch.Tensor:
    """The image after a slant along x, a turn about its centre and a shift by (right, down), bilinear.

    A positive turn is clockwise; a positive slant moves the upper half to the right.
    """
    if not (rotation_degrees or shear_degrees or any(shift_px)):
        return image_CHW
    kernel = partial(
        functional.affine,
        angle=rotation_degrees,
        translate=list(shift_px),
        scale=1.0,
        shear=[shear_degrees, 0.0],
        interpolation=InterpolationMode.BILINEAR,
    )
    return warp_filled(image_CHW, kernel, fill_C)


def warp_filled(
    image_CHW: torch.Tensor, kernel: Callable[[torch.Tensor], torch.Tensor], fill_C: Sequence[int]
) -> torch.Tensor:
    """The uint8 image under a kernel that moves float pixels and leaves 0 where it has none; there is the fill.

    torchvision's own fill weighs pixels at the border twice by how far they are covered, and draws a dark line
    there. Relative to the fill colour there is nothing to weigh.
    """
    fill_C11 = torch.tensor(fill_C, dtype=torch.float32).view(3, 1, 1)
    return kernel(image_CHW - fill_C11).add_(fill_C11).round_().to(torch.uint8)


def draw_perspective(
    image_CHW: torch.Tensor, section: Perspective | None, fill_C: Sequence[int], rng: np.random.Generator
) -> torch.Tensor:
    """The image as a plane seen from another place: each corner moves inwards, in whole pixels."""
    if section is None or not section.distortion or not happens(rng, section.probability):
        return image_CHW
    height_px, width_px = image_CHW.shape[1:]
    right, bottom = width_px - 1, height_px - 1
    corners = [(0, 0), (right, 0), (right, bottom), (0, bottom)]
    max_x, max_y = (int(section.distortion * (side // 2)) for side in (width_px, height_px))
    moved = []
    for x, y in corners:
        inwards_x, inwards_y = below(rng, max_x + 1), below(rng, max_y + 1)
        moved.append([x - inwards_x if x else inwards_x, y - inwards_y if y else inwards_y])
    kernel = partial(
        functional.perspective,
        startpoints=[list(corner) for corner in corners],
        endpoints=moved,
        interpolation=InterpolationMode.BILINEAR,
    )
    return warp_filled(image_CHW, kernel, fill_C)


def draw_elastic(
    image_CHW: torch.Tensor, section: Elastic | None, fill_C: Sequence[int], rng: np.random.Generator
) -> torch.Tensor:
    """The image with every pixel moved by a smooth random field."""
    if section is None or not section.displacement_px or not happens(rng, section.probability):
        return image_CHW
    offsets_DHW = elastic_field(image_CHW.shape[1], image_CHW.shape[2], section, rng)
    # torchvision counts displacements in half sides of the image.
    half_sides_D11 = np.array(image_CHW.shape[:0:-1]).reshape(2, 1, 1) / 2
    displacement_DHW = torch.from_numpy((offsets_DHW / half_sides_D11).astype(np.float32))
    kernel = partial(
        functional.elastic,
        displacement=displacement_DHW.permute(1, 2, 0)[None],
        interpolation=InterpolationMode.BILINEAR,
    )
    return warp_filled(image_CHW, kernel, fill_C)


def elastic_field(height_px: int, width_px: int, section: Elastic, rng: np.random.Generator) -> np.ndarray:
    """From where each pixel comes, as (right, down) in pixels: float64 of shape (2, height, width).

    Uniform noise in -1..1 under a Gaussian, times alpha (Simard et al. 2003). The Gaussian leaves the noise a
    standard deviation of 1 / (sigma sqrt(12 pi)), so alpha is what brings that to `displacement_px`. The noise goes on
    at the opposite border: reflected, as is usual, it would have up to twice the deviation there.
    """
    from scipy.ndimage import gaussian_filter  # noqa: PLC0415 (half a second of every worker's start, and few warp)

    noise_DHW = 2 * rng.random((2, height_px, width_px)) - 1
    alpha = section.displacement_px * section.sigma_px * math.sqrt(12 * math.pi)
    smooth_DHW: np.ndarray = gaussian_filter(noise_DHW, (0, section.sigma_px, section.sigma_px), mode="wrap")
    return alpha * smooth_DHW


def draw_erasing(
    image_CHW: torch.Tensor, section: Erasing | None, fill_C: Sequence[int], rng: np.random.Generator
) -> torch.Tensor:
    """The image, a random box of which has the fill colour."""
    if section is None or not happens(rng, section.probability):
        return image_CHW
    height_px, width_px = image_CHW.shape[1:]
    box_area = height_px * width_px * uniform(rng, *section.area)
    ratio = math.exp(uniform(rng, math.log(section.aspect[0]), math.log(section.aspect[1])))
    width = min(max(round(math.sqrt(box_area * ratio)), 1), width_px)
    height = min(max(round(math.sqrt(box_area / ratio)), 1), height_px)
    top, left = below(rng, height_px - height + 1), below(rng, width_px - width + 1)
    erased_CHW = image_CHW.clone()
    box = Box(top=top, left=left, height=height, width=width)
    cut(erased_CHW, box).copy_(torch.tensor(fill_C, dtype=torch.uint8).view(3, 1, 1))
    return erased_CHW


def _random_crop(image_CHW: torch.Tensor, crop_px: int, crop: Crop, rng: np.random.Generator) -> torch.Tensor:
    """The square at a random place of the image in its padding, of which only what is shown is ever made."""
    height_px, width_px = image_CHW.shape[1:]
    top = below(rng, height_px + 2 * crop.padding_px - crop_px + 1) - crop.padding_px
    left = below(rng, width_px + 2 * crop.padding_px - crop_px + 1) - crop.padding_px
    if 0 <= top <= height_px - crop_px and 0 <= left <= width_px - crop_px:
        return cut(image_CHW, Box(top=top, left=left, height=crop_px, width=crop_px))
    if crop.padding is Padding.REFLECT:
        rows, columns = _reflected(top, crop_px, height_px), _reflected(left, crop_px, width_px)
        return image_CHW[:, rows[:, None], columns]
    crop_CHW = torch.zeros((crop_px, crop_px, 3), dtype=torch.uint8).permute(2, 0, 1)
    shown = Box(
        top=max(top, 0),
        left=max(left, 0),
        height=min(top + crop_px, height_px) - max(top, 0),
        width=min(left + crop_px, width_px) - max(left, 0),
    )
    if shown.height > 0 and shown.width > 0:
        place = Box(top=shown.top - top, left=shown.left - left, height=shown.height, width=shown.width)
        cut(crop_CHW, place).copy_(cut(image_CHW, shown))
    return crop_CHW


def _reflected(start: int, crop_px: int, side_px: int) -> torch.Tensor:
    """Which row or column of the image each one of the crop shows, mirrored at the edges and again beyond."""
    places = torch.arange(start, start + crop_px).abs_().remainder_(max(2 * (side_px - 1), 1))
    return torch.minimum(places, 2 * (side_px - 1) - places).clamp_(min=0)
