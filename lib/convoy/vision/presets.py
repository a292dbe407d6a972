"""Presets: the eval transform that a weight set was trained with, as a value."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field, FiniteFloat

from convoy.core.config import StrictModel


class Interpolation(StrEnum):
    """How pixels are resampled. All are antialiased."""

    BILINEAR = "bilinear"
    BICUBIC = "bicubic"


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_Deviation = Annotated[FiniteFloat, Field(gt=0)]


class CropGeometry(StrictModel):
    """The part of a preset that decides about pixels; networks that agree in it can share crops.

    Resize so that the short side is `resize_px` (null: do not resize), then cut a square of `crop_px`. With
    `resize_px` null an image smaller than the crop is rejected as too small.
    """

    resize_px: int | None = Field(default=256, gt=0)
    crop_px: int = Field(default=224, gt=0)
    interpolation: Interpolation = Interpolation.BILINEAR


class EvalPreset(CropGeometry):
    """The central crop, and how its pixels are normalised.

    `mean` and `std` normalise pixels scaled to 0..1, channel by channel in RGB order.
    """

    mean: tuple[FiniteFloat, FiniteFloat, FiniteFloat] = IMAGENET_MEAN
    std: tuple[_Deviation, _Deviation, _Deviation] = IMAGENET_STD


def geometry_of(preset: EvalPreset) -> CropGeometry:
    """The geometry of a preset, equal for presets that differ in mean and deviation only."""
    return CropGeometry(**preset.model_dump(include=set(CropGeometry.model_fields)))


def dense_preset(preset: EvalPreset) -> EvalPreset:
    """The preset whose crop is the largest central square of the resized image, for networks that take any size."""
    return preset.model_copy(update={"crop_px": preset.resize_px or preset.crop_px})


def at_resolution(preset: EvalPreset, crop_px: int | None) -> EvalPreset:
    """The preset for crops of another size: the resize before the crop is scaled alike."""
    if crop_px is None or crop_px == preset.crop_px:
        return preset
    # Without a resize a smaller crop would show less of the image instead of the same, smaller.
    short_side_px = preset.resize_px or preset.crop_px
    return preset.model_copy(
        update={"crop_px": crop_px, "resize_px": round(short_side_px * crop_px / preset.crop_px)}
    )
