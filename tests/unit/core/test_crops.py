from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as reference

from convoy.core.crops import (
    Box,
    center_band_box,
    center_crop_box,
    five_crop_boxes,
    random_resized_crop_box,
    resized_size,
)

sides = st.integers(1, 60)
AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)


def numbered(height_px: int, width_px: int) -> torch.Tensor:
    """An image whose every pixel has its own number."""
    return torch.arange(height_px * width_px, dtype=torch.int32).view(1, height_px, width_px)


def cut(image: torch.Tensor, box: Box) -> torch.Tensor:
    return image[:, box.top : box.top + box.height, box.left : box.left + box.width]


@given(sides, sides, st.integers(1, 90))
def test_resized_size_is_torchvisions(height_px: int, width_px: int, short_side_px: int) -> None:
    resized = reference.resize(torch.zeros(1, height_px, width_px), [short_side_px])
    assert resized_size(height_px, width_px, short_side_px) == tuple(resized.shape[1:])


def test_resized_size_of_usual_photos() -> None:
    assert resized_size(375, 500, 256) == (256, 341)
    assert resized_size(500, 375, 256) == (341, 256)
    assert resized_size(32, 32, 224) == (224, 224)


@given(st.integers(1, 30), st.integers(0, 30), st.integers(0, 30))
def test_center_crop_is_torchvisions(crop_px: int, extra_height: int, extra_width: int) -> None:
    image = numbered(crop_px + extra_height, crop_px + extra_width)
    box = center_crop_box(*image.shape[1:], crop_px)
    assert torch.equal(cut(image, box), reference.center_crop(image, [crop_px, crop_px]))


@given(st.integers(1, 30), st.integers(0, 30), st.integers(0, 30))
def test_five_and_ten_crops_are_torchvisions(crop_px: int, extra_height: int, extra_width: int) -> None:
    image = numbered(crop_px + extra_height, crop_px + extra_width)
    five = five_crop_boxes(*image.shape[1:], crop_px)
    mirrored = [box.mirrored(image.shape[2]) for box in five]
    crops = [cut(image, box) for box in five] + [cut(image, box).flip(-1) for box in mirrored]
    expected = reference.ten_crop(image, [crop_px, crop_px])
    assert all(torch.equal(one, other) for one, other in zip(crops, expected, strict=True))


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 20))
def test_center_band_bounds_the_aspect_and_keeps_the_centre(
    height_px: int, width_px: int, max_aspect: int
) -> None:
    box = center_band_box(height_px, width_px, max_aspect)
    assert max(box.height, box.width) <= max_aspect * min(box.height, box.width)
    assert min(box.height, box.width) == min(height_px, width_px)
    assert 0 <= (height_px - box.height) - 2 * box.top <= 1
    assert 0 <= (width_px - box.width) - 2 * box.left <= 1


def test_center_band_of_a_usual_image_is_the_whole_image() -> None:
    assert center_band_box(375, 500, 16) == Box(top=0, left=0, height=375, width=500)


@given(sides, sides, st.integers(0, 2**32))
def test_random_box_lies_inside_the_image(height_px: int, width_px: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    box = random_resized_crop_box(height_px, width_px, area=AREA, aspect=ASPECT, rng=rng)
    assert box.top >= 0
    assert box.left >= 0
    assert 0 < box.height <= height_px - box.top
    assert 0 < box.width <= width_px - box.left


@settings(max_examples=50)
@given(st.integers(0, 2**32))
def test_random_box_keeps_area_and_aspect_ranges(seed: int) -> None:
    rng = np.random.default_rng(seed)
    box = random_resized_crop_box(1000, 1000, area=(0.2, 0.5), aspect=(0.8, 1.25), rng=rng)
    assert 0.199 < box.height * box.width / 1e6 < 0.501
    assert 0.795 < box.width / box.height < 1.256


@pytest.mark.parametrize("size", [(100, 140), (90, 30)])
def test_random_boxes_are_distributed_as_torchvisions(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    image = torch.zeros(1, *size)
    theirs = np.array([RandomResizedCrop.get_params(image, AREA, ASPECT) for _ in range(4000)])
    boxes = (random_resized_crop_box(*size, area=AREA, aspect=ASPECT, rng=rng) for _ in range(4000))
    ours = np.array([(box.top, box.left, box.height, box.width) for box in boxes])
    standard_error = np.hypot(theirs.std(axis=0), ours.std(axis=0)) / np.sqrt(4000)
    assert (np.abs(theirs.mean(axis=0) - ours.mean(axis=0)) < 4.5 * standard_error).all()
    assert np.allclose(theirs.std(axis=0), ours.std(axis=0), rtol=0.08)


@pytest.mark.parametrize("size", [(10, 900), (900, 10), (7, 1000), (50, 50)])
def test_random_box_falls_back_to_torchvisions_central_box(size: tuple[int, int]) -> None:
    """The whole area at an aspect ratio that the image does not have: no attempt can succeed."""
    aspect = (0.7, 0.8) if size == (50, 50) else ASPECT
    box = random_resized_crop_box(*size, area=(1.0, 1.0), aspect=aspect, rng=np.random.default_rng(0))
    expected = RandomResizedCrop.get_params(torch.zeros(1, *size), [1.0, 1.0], list(aspect))
    assert (box.top, box.left, box.height, box.width) == expected


def test_random_box_of_a_pixel_row_is_not_empty() -> None:
    rng = np.random.default_rng(0)
    box = random_resized_crop_box(1, 5000, area=AREA, aspect=(0.1, 0.2), rng=rng)
    assert (box.height, box.width) == (1, 1)
