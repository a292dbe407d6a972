"""Views: deterministic crops of a decoded image at the size a network wants, and their normalisation.

View 0 is the eval transform of a preset. Every further view is a random-resized crop, a pure function of
(seed, content, view). Pixels stay uint8 until `normalise`: a quarter of the bytes travels to the device.
"""

from __future__ import annotations

import torch
from torch.nn.functional import interpolate

from convoy.core.crops import Box, center_band_box, center_crop_box, random_resized_crop_box, resized_size
from convoy.core.errors import ConfigError
from convoy.core.randomness import generator
from convoy.core.records import RejectCode, SampleRejected, Stage
from convoy.vision.presets import EvalPreset, Interpolation
from convoy.vision.view_policy import EVAL_VIEW, ViewPolicy

# A strip of 2 x 50,000 pixels, resized to a short side of 256, would take 5 GB and show its centre only.
_MAX_ASPECT = 16


def prepare_view(
    pixels_CHW: torch.Tensor,
    preset: EvalPreset,
    out_CHW: torch.Tensor,
    *,
    view: int,
    policy: ViewPolicy | None,
    content_id: bytes,
) -> None:
    """Write one view of an uint8 image into `out_CHW`, uint8 of shape (3, crop_px, crop_px).

    Fastest with both channels last in memory, as `decode_image` returns them: `out_CHW` then is a row of a
    batch made with `memory_format=torch.channels_last`. In view 0 an image longer than 16 times its short
    side is first cut to its centre. Raises SampleRejected (too small) where the preset says so, and
    ConfigError for a view above 0 without policy.
    """
    _check_size(pixels_CHW, preset)
    if view == EVAL_VIEW:
        out_CHW.copy_(_eval_crop(pixels_CHW, preset))
        return
    if policy is None or view < 0:
        raise ConfigError("a view above 0 needs a view policy", where=f"view {view}", next_step="set one")
    rng = generator(policy.seed, content_id, view)
    height_px, width_px = pixels_CHW.shape[1:]
    box = random_resized_crop_box(
        height_px, width_px, area=policy.crop_area, aspect=policy.crop_aspect, rng=rng
    )
    cropped_CHW = resize(cut(pixels_CHW, box), (preset.crop_px, preset.crop_px), preset.interpolation)
    is_mirrored = rng.random() < policy.mirror_probability
    out_CHW.copy_(cropped_CHW.flip(-1) if is_mirrored else cropped_CHW)


def normalise(images_BCHW: torch.Tensor, preset: EvalPreset) -> torch.Tensor:
    """uint8 images of shape (B, 3, H, W) as float32: scaled to 0..1, less mean, over standard deviation.

    Runs where the images are, keeps their memory format, and compiles without a graph break.
    """
    shape_C11 = (3, 1, 1)
    mean_C11 = torch.tensor(preset.mean, device=images_BCHW.device).view(shape_C11)
    std_C11 = torch.tensor(preset.std, device=images_BCHW.device).view(shape_C11)
    return images_BCHW.to(torch.float32).div_(255).sub_(mean_C11).div_(std_C11)


def cut(images: torch.Tensor, box: Box) -> torch.Tensor:
    """The box of one image or of a batch, as a view of the same memory."""
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


def _check_size(pixels_CHW: torch.Tensor, preset: EvalPreset) -> None:
    """Reject in every view what view 0 cannot show, so that a sample has all its views or none."""
    height_px, width_px = pixels_CHW.shape[1:]
    short_side_px = preset.resize_px or min(height_px, width_px)
    if short_side_px < preset.crop_px:
        reason = f"{width_px}x{height_px} pixels; the crop is {preset.crop_px}"
        raise SampleRejected(RejectCode.TOO_SMALL, Stage.DECODE, reason)


def _eval_crop(pixels_CHW: torch.Tensor, preset: EvalPreset) -> torch.Tensor:
    height_px, width_px = pixels_CHW.shape[1:]
    if preset.resize_px is not None:
        band = center_band_box(height_px, width_px, _MAX_ASPECT)
        height_px, width_px = resized_size(band.height, band.width, preset.resize_px)
        pixels_CHW = resize(cut(pixels_CHW, band), (height_px, width_px), preset.interpolation)
    return cut(pixels_CHW, center_crop_box(height_px, width_px, preset.crop_px))
