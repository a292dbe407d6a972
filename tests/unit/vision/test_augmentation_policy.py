from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from convoy.core.config import load_config
from convoy.core.errors import ConfigError
from convoy.core.fingerprints import digest
from convoy.vision.augmentation_policy import (
    READY_POLICIES,
    AugmentationPolicy,
    Crop,
    CropKind,
    Mirror,
    PcaBasis,
    PcaColour,
    view_recipe,
)
from convoy.vision.presets import EvalPreset

PRESET = EvalPreset(resize_px=64, crop_px=56)
BASIS = PcaBasis(eigenvalues=(0.2, 0.02, 0.004), eigenvectors=((1, 0, 0), (0, 1, 0), (0, 0, 1)))


def section(name: str, **values: Any) -> AugmentationPolicy:
    return AugmentationPolicy.model_validate({name: values})


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("crop", {"area": (0.5, 0.2)}),
        ("crop", {"area": (0, 1)}),
        ("crop", {"area": (0.5, 1.1)}),
        ("crop", {"aspect": (2, 1)}),
        ("crop", {"padding_px": -1}),
        ("mirror", {"probability": 1.1}),
        ("rotation", {"degrees": 181}),
        ("shear", {"degrees": 90}),
        ("elastic", {"sigma_px": 0}),
        ("elastic", {"displacement_px": -1}),
        ("perspective", {"distortion": 1.5}),
        ("colour_shift", {"levels": 256}),
        ("pca_colour", {"strength": -0.1}),
        ("colour_jitter", {"hue": 0.6}),
        ("colour_jitter", {"contrast": -0.1}),
        ("grey", {"probability": -0.1}),
        ("erasing", {"area": (0.5, 1.5)}),
        ("automatic", {"kind": "rand_augment", "magnitude": 31}),
        ("rotation", {"degree": 10}),
    ],
)
def test_impossible_strengths_are_refused(name: str, values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=name):
        section(name, **values)


def test_default_is_the_light_policy_and_every_ready_policy_is_valid() -> None:
    assert AugmentationPolicy() == AugmentationPolicy.ready("light")
    assert AugmentationPolicy().mirror == Mirror(probability=0.5)
    policies = [AugmentationPolicy.ready(name) for name in READY_POLICIES]
    assert len({digest(policy) for policy in policies}) == len(policies) == 4
    assert AugmentationPolicy.ready("none").crop.kind is CropKind.EVAL
    assert AugmentationPolicy.ready("none").mirror is None


def test_config_names_a_ready_policy_and_changes_it() -> None:
    named = AugmentationPolicy.model_validate("standard")
    changed = load_config(
        AugmentationPolicy, None, ["base=standard", "rotation.degrees=5", "seed=3", "erasing=null"]
    )
    assert (named.automatic, changed.automatic) == (changed.automatic, named.automatic)
    assert changed.rotation is not None
    assert (changed.rotation.degrees, changed.seed, changed.erasing) == (5, 3, None)
    assert AugmentationPolicy.model_validate(changed.model_dump(mode="json")) == changed


def test_what_is_said_of_a_section_changes_that_of_the_ready_policy_only() -> None:
    padded = load_config(AugmentationPolicy, None, ["base=cifar", "crop.padding=reflect"]).crop
    assert (padded.kind, padded.padding) == (CropKind.RANDOM, "reflect")
    erasing = AugmentationPolicy.model_validate({"base": "standard", "erasing": {"area": (0.1, 0.2)}}).erasing
    assert erasing is not None
    assert (erasing.probability, erasing.area) == (0.1, (0.1, 0.2))
    other = AugmentationPolicy.model_validate({"base": "cifar", "crop": {"kind": "random_resized"}})
    assert other.crop == Crop()


def test_unknown_ready_policy_and_unknown_key_name_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="only: none, light, cifar, standard"):
        load_config(AugmentationPolicy, None, ["base=strong"])
    with pytest.raises(ConfigError, match="did you mean 'rotation'"):
        load_config(AugmentationPolicy, None, ["rotations.degrees=5"])


def test_recipe_of_a_drawn_view_depends_on_all_of_the_policy() -> None:
    policies = [
        AugmentationPolicy(seed=7),
        AugmentationPolicy(seed=8),
        AugmentationPolicy(seed=7, mirror=None),
        AugmentationPolicy(seed=7, mirror=Mirror(probability=0.4)),
        AugmentationPolicy(seed=7, crop=Crop(area=(0.3, 1.0))),
        AugmentationPolicy(seed=7, crop=Crop(aspect=(0.8, 1.25))),
        AugmentationPolicy(seed=7, pca_colour=PcaColour(basis=BASIS)),
        AugmentationPolicy(seed=7, pca_colour=PcaColour(basis=BASIS, strength=0.2)),
    ]
    recipes = [view_recipe(PRESET, policy, 1) for policy in policies] + [view_recipe(PRESET, policies[0], 2)]
    assert len({digest(recipe) for recipe in recipes}) == 9


def test_recipe_of_a_drawn_view_depends_on_the_colour_of_borders() -> None:
    dark = PRESET.model_copy(update={"mean": (0.1, 0.1, 0.1)})
    policy = AugmentationPolicy()
    assert view_recipe(dark, policy, 0) == view_recipe(PRESET, policy, 0)
    assert view_recipe(dark, policy, 1) != view_recipe(PRESET, policy, 1)


def test_policy_without_its_principal_colours_has_no_recipe_for_drawn_views() -> None:
    policy = AugmentationPolicy(pca_colour=PcaColour())
    assert policy.lacks_basis
    assert view_recipe(PRESET, policy, 0) == view_recipe(PRESET, None, 0)
    with pytest.raises(ConfigError, match="convoy cache"):
        view_recipe(PRESET, policy, 1)
    filled = policy.with_basis(BASIS)
    assert not filled.lacks_basis
    assert view_recipe(PRESET, filled, 1)["policy"]["pca_colour"]["basis"]["eigenvalues"] == [
        0.2,
        0.02,
        0.004,
    ]


def test_principal_colours_without_strength_are_not_needed() -> None:
    assert not AugmentationPolicy(pca_colour=PcaColour(strength=0)).lacks_basis
    assert not AugmentationPolicy().with_basis(BASIS).lacks_basis
    assert AugmentationPolicy().with_basis(BASIS) == AugmentationPolicy()
