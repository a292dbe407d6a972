from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from convoy.core.fingerprints import digest
from convoy.vision.augmentation import augment
from convoy.vision.augmentation_policy import AugmentationPolicy, CropKind, PcaBasis
from convoy.vision.augmentation_strengths import AugmentationKind, Strength, policy_of
from convoy.vision.cropping import eval_crop
from convoy.vision.presets import EvalPreset

BASIS = PcaBasis(eigenvalues=(0.2, 0.02, 0.004), eigenvectors=((1, 0, 0), (0, 1, 0), (0, 0, 1)))
NONE = AugmentationPolicy.ready("none")
_SECTIONS = [name for name in AugmentationPolicy.model_fields if name not in ("seed", "crop")]


def moved_levels(kind: AugmentationKind, strength: Strength, *, crop_px: int) -> float:
    """How far a kind changes the pixels of an image in the mean over some draws."""
    preset = EvalPreset(resize_px=crop_px, crop_px=crop_px)
    side = torch.linspace(0, 6.28, crop_px)
    waves = torch.stack(
        [side.sin()[:, None] * (2 * side).cos(), side.cos()[:, None] + side.sin(), side[:, None] - side]
    )
    image_CHW = (127 + 60 * waves / waves.abs().amax((1, 2), keepdim=True)).to(torch.uint8)
    plain_CHW, drawn_CHW = eval_crop(image_CHW, preset), torch.empty(3, crop_px, crop_px, dtype=torch.uint8)
    policy = policy_of(kind, strength, crop_px=crop_px).with_basis(BASIS)
    distances = []
    for draw in range(40):
        augment(image_CHW, preset, drawn_CHW, policy=policy, rng=np.random.default_rng(draw))
        distances.append(float((drawn_CHW.float() - plain_CHW.float()).abs().mean()))
    return float(np.mean(distances))


@pytest.mark.parametrize("kind", list(AugmentationKind))
def test_every_kind_is_alone_and_grows_with_its_strength(kind: AugmentationKind) -> None:
    for strength in Strength:
        policy = policy_of(kind, strength, crop_px=32)
        others = [name for name in _SECTIONS if getattr(policy, name) is not None]
        crops = policy.crop.kind is not CropKind.EVAL
        assert len(others) + crops == 1
    weak, medium, strong = (moved_levels(kind, strength, crop_px=32) for strength in Strength)
    assert 0 < weak < medium < strong


@pytest.mark.parametrize("kind", [AugmentationKind.SHIFT, AugmentationKind.ELASTIC])
def test_lengths_grow_with_the_crop(kind: AugmentationKind) -> None:
    """In pixels that are alike for every size a large image would hardly change."""
    small, large = (moved_levels(kind, Strength.MEDIUM, crop_px=crop_px) for crop_px in (32, 128))
    assert large == pytest.approx(small, rel=0.4)


def test_no_two_policies_are_the_same() -> None:
    every = itertools.product(AugmentationKind, Strength)
    digests = {digest(policy_of(kind, strength, crop_px=224)) for kind, strength in every}
    assert len(digests) == len(AugmentationKind) * len(Strength)
    assert digest(NONE) not in digests
