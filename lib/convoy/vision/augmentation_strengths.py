"""Every kind of augmentation alone, at three strengths: policies to measure what one kind does. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from convoy.vision.augmentation_policy import AugmentationPolicy


class AugmentationKind(StrEnum):
    """The kinds of an AugmentationPolicy; of those that come in two forms both."""

    RANDOM_RESIZED_CROP = "random_resized_crop"
    SHIFT = "shift"
    MIRROR = "mirror"
    ROTATION = "rotation"
    SHEAR = "shear"
    PERSPECTIVE = "perspective"
    ELASTIC = "elastic"
    RAND_AUGMENT = "rand_augment"
    TRIVIAL_AUGMENT = "trivial_augment"
    COLOUR_JITTER = "colour_jitter"
    COLOUR_SHIFT = "colour_shift"
    PCA_COLOUR = "pca_colour"
    GREY = "grey"
    ERASING = "erasing"


class Strength(StrEnum):
    """How strong a kind is: `medium` is about what its paper or the usual recipes take."""

    WEAK = "weak"
    MEDIUM = "medium"
    STRONG = "strong"


# By kind: the section, what it always says, and what it says at each strength. `strong` is meant to show where
# the kind ends: every image mirrored, any orientation, no colour.
_SECTIONS: Mapping[AugmentationKind, tuple[str, Mapping[str, Any], tuple[Mapping[str, Any], ...]]] = {
    AugmentationKind.RANDOM_RESIZED_CROP: (
        "crop",
        {"kind": "random_resized"},
        ({"area": (0.7, 1.0)}, {"area": (0.35, 1.0)}, {"area": (0.08, 1.0)}),
    ),
    AugmentationKind.MIRROR: (
        "mirror",
        {},
        ({"probability": 0.25}, {"probability": 0.5}, {"probability": 1.0}),
    ),
    AugmentationKind.ROTATION: ("rotation", {}, ({"degrees": 10}, {"degrees": 30}, {"degrees": 180})),
    AugmentationKind.SHEAR: ("shear", {}, ({"degrees": 5}, {"degrees": 10}, {"degrees": 30})),
    AugmentationKind.PERSPECTIVE: (
        "perspective",
        {},
        ({"distortion": 0.15}, {"distortion": 0.3}, {"distortion": 0.6}),
    ),
    AugmentationKind.RAND_AUGMENT: (
        "automatic",
        {"kind": "rand_augment"},
        ({"magnitude": 5}, {"magnitude": 9}, {"magnitude": 18}),
    ),
    AugmentationKind.TRIVIAL_AUGMENT: (
        "automatic",
        {"kind": "trivial_augment"},
        ({"probability": 0.25}, {"probability": 0.5}, {"probability": 1.0}),
    ),
    AugmentationKind.COLOUR_JITTER: (
        "colour_jitter",
        {},
        (
            {"brightness": 0.1, "contrast": 0.1, "saturation": 0.1},
            {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2},
            {"brightness": 0.5, "contrast": 0.5, "saturation": 0.5, "hue": 0.1},
        ),
    ),
    AugmentationKind.COLOUR_SHIFT: ("colour_shift", {}, ({"levels": 10}, {"levels": 20}, {"levels": 60})),
    AugmentationKind.PCA_COLOUR: (
        "pca_colour",
        {},
        ({"strength": 0.05}, {"strength": 0.1}, {"strength": 0.5}),
    ),
    AugmentationKind.GREY: ("grey", {}, ({"probability": 0.1}, {"probability": 0.5}, {"probability": 1.0})),
    AugmentationKind.ERASING: (
        "erasing",
        {},
        ({"probability": 0.25}, {"probability": 0.5}, {"probability": 1.0}),
    ),
}
# Of the side of the crop, as these kinds count in pixels.
_SHIFT_SHARES = (1 / 16, 1 / 8, 1 / 4)
_ELASTIC_SHARES = (1 / 200, 1 / 100, 1 / 30)
_ELASTIC_SIGMA_SHARE = 1 / 14


def policy_of(kind: AugmentationKind, strength: Strength, *, crop_px: int) -> AugmentationPolicy:
    """The policy that draws this kind and nothing else, on the crop of the eval view, for crops of that size."""
    place = list(Strength).index(strength)
    section, values = _section(kind, place, crop_px)
    return AugmentationPolicy.model_validate({"base": "none", section: values})


def _section(kind: AugmentationKind, place: int, crop_px: int) -> tuple[str, dict[str, Any]]:
    if kind is AugmentationKind.SHIFT:
        padding_px = max(round(_SHIFT_SHARES[place] * crop_px), 1)
        return "crop", {"kind": "random", "padding_px": padding_px, "padding": "reflect"}
    if kind is AugmentationKind.ELASTIC:
        displacement_px, sigma_px = _ELASTIC_SHARES[place] * crop_px, _ELASTIC_SIGMA_SHARE * crop_px
        return "elastic", {"displacement_px": displacement_px, "sigma_px": sigma_px}
    section, always, by_strength = _SECTIONS[kind]
    return section, {**always, **by_strength[place]}
