"""RandAugment and TrivialAugment: operations of a fixed space, drawn with our own generator.

Operations, largest magnitudes and 31 steps of magnitude are those of torchvision's RandAugment and
TrivialAugmentWide, which draw from torch's global generator and so cannot serve many threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from enum import StrEnum
from functools import partial

import numpy as np
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from convoy.vision.augmentation_geometry import warp_affine, warp_filled
from convoy.vision.augmentation_policy import Automatic, AutomaticKind
from convoy.vision.draws import below, happens

_LAST_STEP = 30


class Operation(StrEnum):
    """What both policies draw from."""

    IDENTITY = "Identity"
    SHEAR_X = "ShearX"
    SHEAR_Y = "ShearY"
    TRANSLATE_X = "TranslateX"
    TRANSLATE_Y = "TranslateY"
    ROTATE = "Rotate"
    BRIGHTNESS = "Brightness"
    COLOUR = "Color"
    CONTRAST = "Contrast"
    SHARPNESS = "Sharpness"
    POSTERIZE = "Posterize"
    SOLARIZE = "Solarize"
    AUTOCONTRAST = "AutoContrast"
    EQUALIZE = "Equalize"


_ENHANCING = (Operation.BRIGHTNESS, Operation.COLOUR, Operation.CONTRAST, Operation.SHARPNESS)
_SHEARS = (Operation.SHEAR_X, Operation.SHEAR_Y)
_TRANSLATIONS = (Operation.TRANSLATE_X, Operation.TRANSLATE_Y)
_SIGNED = frozenset((*_SHEARS, *_TRANSLATIONS, Operation.ROTATE, *_ENHANCING))

# Tangents for shears, degrees for rotations, 1 + magnitude is the factor of the enhancing operations. For
# posterizing it is the number of bits that go; translations are `_largest_shift_px`.
_LARGEST: dict[AutomaticKind, dict[Operation, float]] = {
    AutomaticKind.RAND_AUGMENT: {
        **dict.fromkeys(_SHEARS, 0.3),
        Operation.ROTATE: 30.0,
        **dict.fromkeys(_ENHANCING, 0.9),
        Operation.POSTERIZE: 4.0,
        Operation.SOLARIZE: 1.0,
    },
    AutomaticKind.TRIVIAL_AUGMENT: {
        **dict.fromkeys(_SHEARS, 0.99),
        Operation.ROTATE: 135.0,
        **dict.fromkeys(_ENHANCING, 0.99),
        Operation.POSTERIZE: 6.0,
        Operation.SOLARIZE: 1.0,
    },
}

_Apply = Callable[[torch.Tensor, float, Sequence[int]], torch.Tensor]


def draw_automatic(
    image_CHW: torch.Tensor, section: Automatic | None, fill_C: Sequence[int], rng: np.random.Generator
) -> torch.Tensor:
    """The uint8 image of shape (3, height, width) after the operations of one draw."""
    if section is None or not happens(rng, section.probability):
        return image_CHW
    is_rand = section.kind is AutomaticKind.RAND_AUGMENT
    for _ in range(section.num_ops if is_rand else 1):
        operation = list(Operation)[below(rng, len(Operation))]
        step = section.magnitude if is_rand else below(rng, _LAST_STEP + 1)
        sign = -1 if operation in _SIGNED and happens(rng, 0.5) else 1
        strength = magnitude(section.kind, operation, step, image_CHW.shape[-1])
        image_CHW = _APPLY[operation](image_CHW, sign * strength, fill_C)
    return image_CHW


def magnitude(kind: AutomaticKind, operation: Operation, step: int, side_px: int) -> float:
    """How strong an operation is at a step of 0..30, in its unit; 0 where it has none."""
    share = step / _LAST_STEP
    if operation in _TRANSLATIONS:
        return share * _largest_shift_px(kind, side_px)
    largest = _LARGEST[kind].get(operation, 0.0)
    if operation is Operation.POSTERIZE:
        return 8 - round(share * largest)
    if operation is Operation.SOLARIZE:
        return 1 - share * largest
    return share * largest


def _largest_shift_px(kind: AutomaticKind, side_px: int) -> float:
    return 150 / 331 * side_px if kind is AutomaticKind.RAND_AUGMENT else 32.0


def _shear(image_CHW: torch.Tensor, tangents: tuple[float, float], fill_C: Sequence[int]) -> torch.Tensor:
    """The image slanted about its upper left corner."""
    kernel = partial(
        functional.affine,
        angle=0.0,
        translate=[0.0, 0.0],
        scale=1.0,
        shear=[math.degrees(math.atan(tangent)) for tangent in tangents],
        interpolation=InterpolationMode.BILINEAR,
        center=[0, 0],
    )
    return warp_filled(image_CHW, kernel, fill_C)


_APPLY: dict[Operation, _Apply] = {
    Operation.IDENTITY: lambda image, _, __: image,
    Operation.SHEAR_X: lambda image, tangent, fill: _shear(image, (tangent, 0.0), fill),
    Operation.SHEAR_Y: lambda image, tangent, fill: _shear(image, (0.0, tangent), fill),
    Operation.TRANSLATE_X: lambda image, px, fill: warp_affine(image, shift_px=(int(px), 0.0), fill_C=fill),
    Operation.TRANSLATE_Y: lambda image, px, fill: warp_affine(image, shift_px=(0.0, int(px)), fill_C=fill),
    Operation.ROTATE: lambda image, degrees, fill: warp_affine(image, rotation_degrees=degrees, fill_C=fill),
    Operation.BRIGHTNESS: lambda image, extra, _: functional.adjust_brightness(image, 1 + extra),
    Operation.COLOUR: lambda image, extra, _: functional.adjust_saturation(image, 1 + extra),
    Operation.CONTRAST: lambda image, extra, _: functional.adjust_contrast(image, 1 + extra),
    Operation.SHARPNESS: lambda image, extra, _: functional.adjust_sharpness(image, 1 + extra),
    Operation.POSTERIZE: lambda image, bits, _: functional.posterize(image, int(bits)),
    Operation.SOLARIZE: lambda image, share, _: functional.solarize(image, 255 * share),
    Operation.AUTOCONTRAST: lambda image, _, __: functional.autocontrast(image),
    Operation.EQUALIZE: lambda image, _, __: functional.equalize(image),
}
