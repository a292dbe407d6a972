"""All crops of an image from one decode: a resize (a resize a scale), then copies into a uint8 batch.

Pixels are copied once for each slot of the crop plan; mirrored views, normalisation and everything that differs
between networks of one geometry happen later, on the device.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from convoy.core.crop_policies import CropPlan, CropPolicy, MultiscaleCrops, SquareCrops
from convoy.core.crops import Box, center_crop_box, five_crop_boxes, square_boxes
from convoy.vision.cropping import check_size, cut, eval_resized, resize
from convoy.vision.presets import CropGeometry


def cut_slots(
    pixels_CHW: torch.Tensor, geometry: CropGeometry, plan: CropPlan, out_SCHW: torch.Tensor
) -> None:
    """Write the slots of one uint8 image into `out_SCHW`, uint8 of shape (num_slots, 3, crop_px, crop_px).

    Fastest with both channels last in memory. The pixels are those of torchvision's v2 transforms on the resized
    image; one longer than 16 times its short side is first cut to its centre. An image that the centre crop
    rejects as too small is rejected by every policy: raises SampleRejected.
    """
    check_size(pixels_CHW, geometry)
    if plan.policy is CropPolicy.MULTISCALE:
        crops = _multiscale_crops(pixels_CHW, geometry, plan.multiscale)
    else:
        crops = _single_scale_crops(pixels_CHW, geometry, plan.policy)
    for slot, crop_CHW in zip(range(len(out_SCHW)), crops, strict=True):
        out_SCHW[slot].copy_(crop_CHW)


def _single_scale_crops(
    pixels_CHW: torch.Tensor, geometry: CropGeometry, policy: CropPolicy
) -> Iterator[torch.Tensor]:
    resized_CHW = eval_resized(pixels_CHW, geometry)
    height_px, width_px = resized_CHW.shape[1:]
    for box in _slot_boxes(policy, height_px, width_px, geometry.crop_px):
        yield cut(resized_CHW, box)


def _slot_boxes(policy: CropPolicy, height_px: int, width_px: int, crop_px: int) -> tuple[Box, ...]:
    center = center_crop_box(height_px, width_px, crop_px)
    of_mirror_image = center.mirrored(width_px)
    if policy is CropPolicy.CENTER:
        return (center,)
    if policy is CropPolicy.FLIP:
        return (center, of_mirror_image)
    five = five_crop_boxes(height_px, width_px, crop_px)
    return five if policy is CropPolicy.FIVE else (*five, of_mirror_image)


def _multiscale_crops(
    pixels_CHW: torch.Tensor, geometry: CropGeometry, multiscale: MultiscaleCrops
) -> Iterator[torch.Tensor]:
    for short_side in multiscale.short_sides:
        # A factor of at least 1, so every crop fits.
        scale = geometry.model_copy(update={"resize_px": round(short_side * geometry.crop_px)})
        resized_CHW = eval_resized(pixels_CHW, scale)
        start, center, end = square_boxes(*resized_CHW.shape[1:])
        for box in (start, center, end) if multiscale.squares == 3 else (center,):
            yield from _square_crops(cut(resized_CHW, box), geometry, multiscale.crops)


def _square_crops(
    square_CHW: torch.Tensor, geometry: CropGeometry, crops: SquareCrops
) -> Iterator[torch.Tensor]:
    side_px, crop_px = square_CHW.shape[1], geometry.crop_px
    if crops is SquareCrops.CENTER:
        yield cut(square_CHW, center_crop_box(side_px, side_px, crop_px))
        return
    for box in five_crop_boxes(side_px, side_px, crop_px):
        yield cut(square_CHW, box)
    yield resize(square_CHW, (crop_px, crop_px), geometry.interpolation)
