"""Views: deterministic crops of a decoded image at the size a network wants, and their normalisation.

View 0 is the eval transform of a preset. Every further view is drawn by an augmentation policy, a pure function
of (seed, content, view). Pixels stay uint8 until `normalise`: a quarter of the bytes travels to the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from convoy.core.errors import ConfigError
from convoy.core.randomness import generator
from convoy.vision.augmentation import augment
from convoy.vision.augmentation_policy import EVAL_VIEW, AugmentationPolicy
from convoy.vision.cropping import eval_crop
from convoy.vision.presets import EvalPreset


def prepare_view(
    pixels_CHW: torch.Tensor,
    preset: EvalPreset,
    out_CHW: torch.Tensor,
    *,
    view: int,
    policy: AugmentationPolicy | None,
    content_id: bytes,
) -> None:
    """Write one view of an uint8 image into `out_CHW`, uint8 of shape (3, crop_px, crop_px).

    Fastest with both channels last in memory, as `decode_image` returns them: `out_CHW` then is a row of a
    batch made with `memory_format=torch.channels_last`. In view 0 an image longer than 16 times its short
    side is first cut to its centre. Raises SampleRejected (too small) where the preset says so, and
    ConfigError for a view above 0 without a policy that can be drawn from.
    """
    if view == EVAL_VIEW:
        out_CHW.copy_(eval_crop(pixels_CHW, preset))
        return
    if policy is None or view < 0:
        raise ConfigError(
            "a view above 0 needs an augmentation policy", where=f"view {view}", next_step="set one"
        )
    augment(pixels_CHW, preset, out_CHW, policy=policy, rng=generator(policy.seed, content_id, view))


def normalise(images_BCHW: torch.Tensor, preset: EvalPreset) -> torch.Tensor:
    """uint8 images of shape (B, 3, H, W) as float32: scaled to 0..1, less mean, over standard deviation.

    Runs where the images are, keeps their memory format, and compiles without a graph break.
    """
    mean_C11 = _per_channel(preset.mean, images_BCHW.device)
    std_C11 = _per_channel(preset.std, images_BCHW.device)
    return images_BCHW.to(torch.float32).div_(255).sub_(mean_C11).div_(std_C11)


def _per_channel(values_C: Sequence[float], device: torch.device) -> torch.Tensor:
    # Filled there: a copy of numbers from here would wait for everything that a GPU still has to do.
    return torch.stack([torch.full((1, 1), value, device=device) for value in values_C])
