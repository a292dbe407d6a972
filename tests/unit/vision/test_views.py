from __future__ import annotations

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification
from torchvision.transforms.v2 import functional as reference

from convoy.core.errors import ConfigError
from convoy.core.fingerprints import digest
from convoy.core.records import RejectCode, SampleRejected
from convoy.vision.augmentation_policy import AugmentationPolicy, view_recipe
from convoy.vision.decode_rule import DecodeRule
from convoy.vision.decoding import decode_image
from convoy.vision.presets import EvalPreset, Interpolation
from convoy.vision.views import normalise, prepare_view
from image_files import encode, photo

PRESET = EvalPreset(resize_px=64, crop_px=56)
POLICY = AugmentationPolicy(seed=7)
CONTENT = b"0123456789abcdef"
MODES = {
    Interpolation.BILINEAR: InterpolationMode.BILINEAR,
    Interpolation.BICUBIC: InterpolationMode.BICUBIC,
}


def pixels(height_px: int, width_px: int, seed: int = 0) -> torch.Tensor:
    """An image in the memory layout of `decode_image`."""
    return torch.from_numpy(photo(height_px, width_px, seed)).permute(2, 0, 1)


def view_of(
    image_CHW: torch.Tensor,
    preset: EvalPreset = PRESET,
    *,
    view: int = 0,
    policy: AugmentationPolicy | None = POLICY,
    content_id: bytes = CONTENT,
) -> torch.Tensor:
    out_CHW = torch.empty(3, preset.crop_px, preset.crop_px, dtype=torch.uint8)
    prepare_view(image_CHW, preset, out_CHW, view=view, policy=policy, content_id=content_id)
    return out_CHW


@settings(max_examples=40)
@given(st.integers(20, 200), st.integers(20, 200), st.sampled_from(Interpolation))
def test_eval_view_is_torchvisions_resize_and_center_crop(
    height_px: int, width_px: int, interpolation: Interpolation
) -> None:
    image = pixels(height_px, width_px)
    preset = EvalPreset(resize_px=64, crop_px=56, interpolation=interpolation)
    resized = reference.resize(image, [64], interpolation=MODES[interpolation], antialias=True)
    assert torch.equal(view_of(image, preset), reference.center_crop(resized, [56, 56]))


def test_normalise_is_that_of_torchvisions_weights() -> None:
    image = pixels(56, 56)
    of_weights = ImageClassification(crop_size=56, resize_size=56)
    assert torch.equal(normalise(image[None], PRESET)[0], of_weights(image))


@pytest.mark.parametrize("interpolation", Interpolation)
def test_eval_view_is_within_rounding_of_the_pillow_pixels_that_weights_were_trained_on(
    interpolation: Interpolation,
) -> None:
    jpeg = encode(photo(375, 500), "JPEG", quality=90)
    preset = EvalPreset(resize_px=256, crop_px=224, interpolation=interpolation)
    of_weights = ImageClassification(crop_size=224, interpolation=MODES[interpolation])
    theirs = of_weights(Image.open(io.BytesIO(jpeg)))
    ours = normalise(view_of(decode_image(jpeg, DecodeRule()).pixels_CHW, preset)[None], preset)[0]
    levels = (ours - theirs).abs() * torch.tensor(preset.std).view(3, 1, 1) * 255
    assert levels.max() < 2.01
    assert levels.mean() < 0.01


@pytest.mark.parametrize("view", [0, 3])
def test_memory_layouts_do_not_change_pixels(view: int) -> None:
    image = pixels(80, 100)
    batch = torch.zeros(2, 3, 56, 56, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    prepare_view(image, PRESET, batch[1], view=view, policy=POLICY, content_id=CONTENT)
    assert torch.equal(batch[1], view_of(image.contiguous(), view=view))
    assert not batch[0].any()


def test_without_resize_the_centre_is_cut_as_it_is() -> None:
    preset = EvalPreset(resize_px=None, crop_px=32)
    assert torch.equal(view_of(pixels(32, 32), preset), pixels(32, 32))
    assert torch.equal(view_of(pixels(40, 36), preset), pixels(40, 36)[:, 4:36, 2:34])


@pytest.mark.parametrize("view", [0, 1])
def test_image_below_the_crop_is_too_small_in_every_view(view: int) -> None:
    preset = EvalPreset(resize_px=None, crop_px=32)
    with pytest.raises(SampleRejected) as caught:
        view_of(pixels(31, 64), preset, view=view)
    assert caught.value.code is RejectCode.TOO_SMALL


def test_small_image_is_enlarged_where_the_preset_resizes() -> None:
    assert view_of(pixels(2, 3)).shape == (3, 56, 56)


def test_thin_strip_shows_its_centre_in_little_memory() -> None:
    """Resized whole, it would take 25 GB."""
    strip = torch.zeros(3, 2, 300_000, dtype=torch.uint8)
    strip[:, :, 149_990:150_010] = 200
    assert (view_of(strip, EvalPreset(resize_px=120, crop_px=100)) == 200).all()


def test_views_are_pure_functions_of_seed_content_and_index() -> None:
    image = pixels(80, 100)
    first = view_of(image, view=1)
    assert torch.equal(first, view_of(image, view=1))
    others = (
        view_of(image, view=0),
        view_of(image, view=2),
        view_of(image, view=1, content_id=b"another content!"),
        view_of(image, view=1, policy=AugmentationPolicy(seed=8)),
    )
    assert not any(torch.equal(first, other) for other in others)


def test_eval_view_needs_no_policy_and_others_do() -> None:
    image = pixels(80, 100)
    assert torch.equal(view_of(image, policy=None), view_of(image, policy=POLICY))
    for view, policy in ((1, None), (-1, POLICY)):
        with pytest.raises(ConfigError):
            view_of(image, view=view, policy=policy)


def test_recipe_of_the_eval_view_is_the_one_that_cached_features_have() -> None:
    assert view_recipe(PRESET, POLICY, 0) == {
        "recipe_version": 1,
        "view": 0,
        "resize_px": 64,
        "crop_px": 56,
        "interpolation": "bilinear",
    }


def test_recipe_of_the_eval_view_depends_on_pixels_of_the_preset_only() -> None:
    plain = view_recipe(PRESET, None, 0)
    assert plain == view_recipe(PRESET, POLICY, 0)
    assert plain == view_recipe(PRESET.model_copy(update={"mean": (0.5, 0.5, 0.5)}), None, 0)
    changes = ({"resize_px": 65}, {"crop_px": 55}, {"interpolation": Interpolation.BICUBIC})
    recipes = [plain, *(view_recipe(PRESET.model_copy(update=change), None, 0) for change in changes)]
    assert len({digest(recipe) for recipe in recipes}) == 4


def test_normalise_keeps_the_memory_format_and_the_input() -> None:
    batch = pixels(8, 8)[None].contiguous(memory_format=torch.channels_last)
    kept = batch.clone()
    assert normalise(batch, PRESET).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch, kept)


def test_normalise_compiles_without_a_graph_break() -> None:
    batch = pixels(8, 8)[None]
    compiled = torch.compile(lambda images: normalise(images, PRESET), backend="eager", fullgraph=True)
    assert torch.equal(compiled(batch), normalise(batch, PRESET))


def test_normalised_pixels_are_those_by_tensors_of_mean_and_standard_deviation() -> None:
    batch = torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean_C, std_C = torch.tensor(PRESET.mean), torch.tensor(PRESET.std)
    expected = (batch.float() / 255 - mean_C[:, None, None]) / std_C[:, None, None]
    assert torch.equal(normalise(batch, PRESET), expected)
