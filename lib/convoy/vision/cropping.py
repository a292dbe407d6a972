"""Cutting and resizing decoded images: the kernels behind every view, and the crop of the eval view."""

from __future__ import annotations

import torch
from torch.nn.functional import interpolate

from convoy.core.crops import Box, center_band_box, center_crop_box, resized_size
from convoy.core.records import RejectCode, SampleRejected, Stage
from convoy.vision.presets import CropGeometry, Interpolation

# A strip of 2 x 50,000 pixels, resized to a short side of 256, would take 5 GB and show its centre only.
_MAX_ASPECT = 16


def cut(images: torch.Tensor, box: Box) -> torch.Tensor:
    """The box of one image or of a batch, as a view of the same memory."""
    if images.shape[-2:] == (box.height, box.width):
        return images
    return images[..., box.top : box.top + box.height, box.left : box.left + box.width]


def resize(pixels_CHW: torch.Tensor, size_px: tuple[int, int], interpolation: Interpolation) -> torch.Tensor:
    """An uint8 image at (height, width) of `size_px`, antialiased: the pixels of torchvision's v2 transforms.

    torch's fixed-point kernel, whatever the CPU; torchvision's wrapper takes floats where there is no AVX2.
    """
    if tuple(pixels_CHW.shape[1:]) == size_px:
        return pixels_CHW
    # A batch of one whose strides say "channels last": `pixels_CHW[None]` hides it, at 1.5 times the time.
    batch_BCHW = pixels_CHW.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    return interpolate(batch_BCHW, size=size_px, mode=interpolation.value, antialias=True)[0]


def check_size(pixels_CHW: torch.Tensor, geometry: CropGeometry) -> None:
    """Reject in every view what the eval view cannot show, so that a sample has all its views or none.

    Raises SampleRejected (too small).
    """
    height_px, width_px = pixels_CHW.shape[1:]
    short_side_px = geometry.resize_px or min(height_px, width_px)
    if short_side_px < geometry.crop_px:
        reason = f"{width_px}x{height_px} pixels; the crop is {geometry.crop_px}"
        raise SampleRejected(RejectCode.TOO_SMALL, Stage.DECODE, reason)


def eval_resized(pixels_CHW: torch.Tensor, geometry: CropGeometry) -> torch.Tensor:
    """The image at the geometry's short side; one longer than 16 times that is first cut to its centre."""
    if geometry.resize_px is None:
        return pixels_CHW
    height_px, width_px = pixels_CHW.shape[1:]
    band = center_band_box(height_px, width_px, _MAX_ASPECT)
    size_px = resized_size(band.height, band.width, geometry.resize_px)
    return resize(cut(pixels_CHW, band), size_px, geometry.interpolation)


def eval_crop(pixels_CHW: torch.Tensor, geometry: CropGeometry) -> torch.Tensor:
    """The pixels of the eval view, uint8 of shape (3, crop_px, crop_px). Raises SampleRejected (too small)."""
    check_size(pixels_CHW, geometry)
    resized_CHW = eval_resized(pixels_CHW, geometry)
    height_px, width_px = resized_CHW.shape[1:]
    return cut(resized_CHW, center_crop_box(height_px, width_px, geometry.crop_px))


def central_square(pixels_CHW: torch.Tensor, max_px: int) -> torch.Tensor:
    """The central square of an image, shrunk to a side of at most `max_px` and never enlarged."""
    side_px = min(max_px, *pixels_CHW.shape[1:])
    return eval_crop(pixels_CHW, CropGeometry(resize_px=side_px, crop_px=side_px))
