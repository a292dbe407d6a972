"""Presets: the eval transform that a weight set was trained with, as a value."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field

from convoy.core.config import StrictModel


class Interpolation(StrEnum):
    """How pixels are resampled. All are antialiased."""

    BILINEAR = "bilinear"
    BICUBIC = "bicubic"


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class EvalPreset(StrictModel):
    """Resize so that the short side is `resize_px` (null: do not resize), then cut the centre `crop_px` square.

    `mean` and `std` normalise pixels scaled to 0..1, channel by channel in RGB order. With `resize_px` null an
    image smaller than the crop is rejected as too small.
    """

    resize_px: int | None = Field(default=256, gt=0)
    crop_px: int = Field(default=224, gt=0)
    interpolation: Interpolation = Interpolation.BILINEAR
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
