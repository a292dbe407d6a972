"""Crop geometry in whole pixels, with the rounding of torchvision's Resize and crops."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

_CROP_ATTEMPTS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A rectangle of pixels. `top` and `left` count from the image's upper left corner."""

    top: int
    left: int
    height: int
    width: int

    def mirrored(self, width_px: int) -> Box:
        """The box that shows the same pixels in the mirror image of an image `width_px` wide."""
        return Box(top=self.top, left=width_px - self.left - self.width, height=self.height, width=self.width)


def resized_size(height_px: int, width_px: int, short_side_px: int) -> tuple[int, int]:
    """(height, width) after a resize to a short side of `short_side_px`; the long side is rounded down."""
    short, long = sorted((height_px, width_px))
    long_side_px = short_side_px * long // short
    return (short_side_px, long_side_px) if height_px <= width_px else (long_side_px, short_side_px)


def center_crop_box(height_px: int, width_px: int, crop_px: int) -> Box:
    """The central square, which must fit into the image. Half a pixel is rounded to the even side."""
    top = round((height_px - crop_px) / 2)
    left = round((width_px - crop_px) / 2)
    return Box(top=top, left=left, height=crop_px, width=crop_px)


def center_band_box(height_px: int, width_px: int, max_aspect: int) -> Box:
    """The central part whose long side is at most `max_aspect` times the short side; else the whole image."""
    height = min(height_px, max_aspect * width_px)
    width = min(width_px, max_aspect * height_px)
    return Box(top=(height_px - height) // 2, left=(width_px - width) // 2, height=height, width=width)


def five_crop_boxes(height_px: int, width_px: int, crop_px: int) -> tuple[Box, ...]:
    """Upper left, upper right, lower left, lower right and central square, which must fit into the image."""
    corners = (
        Box(top=top, left=left, height=crop_px, width=crop_px)
        for top in (0, height_px - crop_px)
        for left in (0, width_px - crop_px)
    )
    return (*corners, center_crop_box(height_px, width_px, crop_px))


def square_boxes(height_px: int, width_px: int) -> tuple[Box, Box, Box]:
    """The squares of the short side at the start, the centre and the end of the long side."""
    side_px = min(height_px, width_px)
    start = Box(top=0, left=0, height=side_px, width=side_px)
    end = Box(top=height_px - side_px, left=width_px - side_px, height=side_px, width=side_px)
    return start, center_crop_box(height_px, width_px, side_px), end


def random_resized_crop_box(
    height_px: int,
    width_px: int,
    *,
    area: tuple[float, float],
    aspect: tuple[float, float],
    rng: np.random.Generator,
) -> Box:
    """A random box with a share of the image's area and an aspect ratio (width / height) from the ranges.

    Inception-style augmentation (Szegedy et al. 2015, "Going Deeper with Convolutions", section 6), as in
    torchvision's RandomResizedCrop: area uniform, log of the aspect ratio uniform, ten attempts, then the
    largest central box within the range of aspect ratios. Draws `rng.random()` only, whose stream numpy keeps
    stable.
    """
    for _ in range(_CROP_ATTEMPTS):
        box_area = height_px * width_px * _uniform(rng, area)
        ratio = math.exp(_uniform(rng, (math.log(aspect[0]), math.log(aspect[1]))))
        width = round(math.sqrt(box_area * ratio))
        height = round(math.sqrt(box_area / ratio))
        if 0 < width <= width_px and 0 < height <= height_px:
            top = int(rng.random() * (height_px - height + 1))
            left = int(rng.random() * (width_px - width + 1))
            return Box(top=top, left=left, height=height, width=width)
    return _largest_central_box(height_px, width_px, aspect)


def _uniform(rng: np.random.Generator, bounds: tuple[float, float]) -> float:
    low, high = bounds
    return low + (high - low) * rng.random()


def _largest_central_box(height_px: int, width_px: int, aspect: tuple[float, float]) -> Box:
    narrowest, widest = aspect
    # A strip one pixel thin would round to nothing; torchvision fails there.
    height = max(1, min(height_px, round(width_px / narrowest)))
    width = max(1, min(width_px, round(height_px * widest)))
    return Box(top=(height_px - height) // 2, left=(width_px - width) // 2, height=height, width=width)
