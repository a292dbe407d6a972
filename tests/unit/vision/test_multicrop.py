from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as reference

from convoy.core.crop_policies import (
    CropPlan,
    CropPolicy,
    MultiscaleCrops,
    SquareCrops,
    crop_views,
    num_slots,
    view_indices,
)
from convoy.core.records import RejectCode, SampleRejected
from convoy.vision.cropping import eval_crop
from convoy.vision.multicrop import cut_slots
from convoy.vision.presets import (
    CropGeometry,
    EvalPreset,
    Interpolation,
    dense_preset,
    geometry_of,
)
from image_files import photo

MODES = {
    Interpolation.BILINEAR: InterpolationMode.BILINEAR,
    Interpolation.BICUBIC: InterpolationMode.BICUBIC,
}
GEOMETRY = CropGeometry(resize_px=40, crop_px=33)


def pixels(height_px: int, width_px: int, seed: int = 0) -> Tensor:
    """An image in the memory layout of `decode_image`."""
    return torch.from_numpy(photo(height_px, width_px, seed)).permute(2, 0, 1)


geometries = st.builds(
    lambda crop_px, extra_px, interpolation: CropGeometry(
        resize_px=crop_px + extra_px, crop_px=crop_px, interpolation=interpolation
    ),
    st.integers(8, 40),
    st.integers(0, 16),
    st.sampled_from(Interpolation),
)
images = st.builds(
    pixels,
    st.integers(10, 120),
    st.integers(10, 120),
    st.integers(0, 1000),
)


def slots_of(image_CHW: Tensor, geometry: CropGeometry, plan: CropPlan) -> Tensor:
    out_SCHW = torch.zeros(num_slots(plan), 3, geometry.crop_px, geometry.crop_px, dtype=torch.uint8)
    cut_slots(image_CHW, geometry, plan, out_SCHW)
    return out_SCHW


def views_of(image_CHW: Tensor, geometry: CropGeometry, plan: CropPlan) -> list[Tensor]:
    slots_SCHW = slots_of(image_CHW, geometry, plan)
    return [
        slots_SCHW[view.slot].flip(-1) if view.mirrored else slots_SCHW[view.slot]
        for view in crop_views(plan)
    ]


def resized(image_CHW: Tensor, size_px: list[int], geometry: CropGeometry) -> Tensor:
    return reference.resize(image_CHW, size_px, interpolation=MODES[geometry.interpolation], antialias=True)


def all_equal(ones: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


@settings(max_examples=60)
@given(images, geometries)
def test_every_policy_is_torchvisions_on_the_same_resized_image(
    image: Tensor, geometry: CropGeometry
) -> None:
    assert geometry.resize_px is not None
    whole = resized(image, [geometry.resize_px], geometry)
    size_px = [geometry.crop_px, geometry.crop_px]
    center = reference.center_crop(whole, size_px)
    of_mirror_image = reference.center_crop(reference.horizontal_flip(whole), size_px)
    expected = {
        CropPolicy.CENTER: [center],
        CropPolicy.FLIP: [center, of_mirror_image],
        CropPolicy.FIVE: list(reference.five_crop(whole, size_px)),
        CropPolicy.TEN: list(reference.ten_crop(whole, size_px)),
    }
    for policy, crops in expected.items():
        assert all_equal(views_of(image, geometry, CropPlan(policy=policy)), crops), policy


def plain_multiscale(image: Tensor, geometry: CropGeometry, multiscale: MultiscaleCrops) -> list[Tensor]:
    """The words of Szegedy et al. 2015, section 7, in calls of torchvision."""
    crops = [
        crop
        for short_side in multiscale.short_sides
        for square in plain_squares(
            resized(image, [round(short_side * geometry.crop_px)], geometry), multiscale.squares
        )
        for crop in plain_crops(square, geometry, multiscale.crops)
    ]
    return crops + [reference.horizontal_flip(crop) for crop in crops if multiscale.mirror]


def plain_squares(whole: Tensor, num_squares: int) -> Iterator[Tensor]:
    height_px, width_px = whole.shape[1:]
    side_px = min(height_px, width_px)
    center = reference.center_crop(whole, [side_px, side_px])
    if num_squares == 1:
        yield center
        return
    yield whole[:, :side_px, :side_px]
    yield center
    yield whole[:, height_px - side_px :, width_px - side_px :]


def plain_crops(square: Tensor, geometry: CropGeometry, crops: SquareCrops) -> Iterator[Tensor]:
    size_px = [geometry.crop_px, geometry.crop_px]
    if crops is SquareCrops.CENTER:
        yield reference.center_crop(square, size_px)
        return
    yield from reference.five_crop(square, size_px)
    yield resized(square, size_px, geometry)


@settings(max_examples=25)
@given(
    images,
    geometries,
    st.builds(
        MultiscaleCrops,
        short_sides=st.lists(st.floats(1, 2), min_size=1, max_size=3).map(tuple),
        squares=st.sampled_from([1, 3]),
        crops=st.sampled_from(SquareCrops),
        mirror=st.booleans(),
    ),
)
def test_multiscale_is_the_plain_reference(
    image: Tensor, geometry: CropGeometry, multiscale: MultiscaleCrops
) -> None:
    plan = CropPlan(policy=CropPolicy.MULTISCALE, multiscale=multiscale)
    expected = plain_multiscale(image, geometry, multiscale)
    assert all_equal(views_of(image, geometry, plan), expected)


@pytest.mark.parametrize("size", [(60, 95), (95, 60), (70, 70)])
def test_the_144_crops_of_googlenet(size: tuple[int, int]) -> None:
    image = pixels(*size)
    geometry = CropGeometry(resize_px=64, crop_px=56)
    views = views_of(image, geometry, CropPlan(policy=CropPolicy.MULTISCALE))
    assert len(views) == 144
    assert all_equal(views, plain_multiscale(image, geometry, MultiscaleCrops()))


def test_short_sides_of_googlenet_at_its_own_resolution() -> None:
    assert [round(side * 224) for side in MultiscaleCrops().short_sides] == [256, 288, 320, 352]


@pytest.mark.parametrize("policy", [CropPolicy.CENTER, CropPolicy.FLIP, CropPolicy.FIVE])
def test_subsets_of_ten_have_its_pixels(policy: CropPolicy) -> None:
    ten = CropPlan(policy=CropPolicy.TEN)
    image = pixels(70, 101)
    all_views = views_of(image, GEOMETRY, ten)
    positions = view_indices(policy, ten)
    assert positions is not None
    chosen = [all_views[position] for position in positions]
    assert all_equal(views_of(image, GEOMETRY, CropPlan(policy=policy)), chosen)


def test_without_a_resize_crops_are_cut_from_the_image_itself() -> None:
    geometry = CropGeometry(resize_px=None, crop_px=32)
    ten = CropPlan(policy=CropPolicy.TEN)
    assert all_equal(
        views_of(pixels(40, 37), geometry, ten), list(reference.ten_crop(pixels(40, 37), [32, 32]))
    )
    small = pixels(32, 32)
    assert torch.equal(slots_of(small, geometry, ten), small.expand(6, -1, -1, -1))


@pytest.mark.parametrize("policy", CropPolicy)
def test_an_image_below_the_crop_is_rejected_by_every_policy(policy: CropPolicy) -> None:
    with pytest.raises(SampleRejected) as caught:
        slots_of(pixels(31, 64), CropGeometry(resize_px=None, crop_px=32), CropPlan(policy=policy))
    assert caught.value.code is RejectCode.TOO_SMALL


@pytest.mark.parametrize("policy", CropPolicy)
def test_a_small_image_is_enlarged_where_the_geometry_resizes(policy: CropPolicy) -> None:
    assert len(slots_of(pixels(3, 5), GEOMETRY, CropPlan(policy=policy))) == num_slots(
        CropPlan(policy=policy)
    )


@pytest.mark.parametrize("policy", CropPolicy)
def test_a_thin_strip_shows_the_band_about_its_centre_in_little_memory(policy: CropPolicy) -> None:
    """Resized whole, it would take gigabytes."""
    strip = torch.zeros(3, 2, 300_000, dtype=torch.uint8)
    strip[:, :, 149_900:150_100] = 200
    assert (slots_of(strip, GEOMETRY, CropPlan(policy=policy)) == 200).all()


@pytest.mark.parametrize("policy", CropPolicy)
def test_memory_layouts_do_not_change_pixels(policy: CropPolicy) -> None:
    plan, image = CropPlan(policy=policy), pixels(50, 61)
    last = torch.zeros(num_slots(plan), 3, 33, 33, dtype=torch.uint8).contiguous(
        memory_format=torch.channels_last
    )
    cut_slots(image, GEOMETRY, plan, last)
    assert torch.equal(last, slots_of(image.contiguous(), GEOMETRY, plan))


def test_presets_that_differ_in_mean_and_deviation_share_their_geometry() -> None:
    one = EvalPreset(resize_px=40, crop_px=33)
    other = EvalPreset(resize_px=40, crop_px=33, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    assert geometry_of(one) == geometry_of(other) == GEOMETRY
    assert geometry_of(one.model_copy(update={"interpolation": Interpolation.BICUBIC})) != GEOMETRY


def test_a_dense_preset_shows_the_whole_central_square() -> None:
    """And nothing beside it: of a 4:3 image three quarters."""
    dense = dense_preset(EvalPreset(resize_px=48, crop_px=33))
    image = pixels(48, 64)
    assert torch.equal(eval_crop(image, dense), image[:, :, 8:56])
    dense = dense_preset(EvalPreset(resize_px=40, crop_px=33))
    image = pixels(40, 40)
    assert torch.equal(eval_crop(image, dense), image)
    assert dense_preset(EvalPreset(resize_px=None, crop_px=32)).crop_px == 32
