from __future__ import annotations

import pytest
from pydantic import ValidationError

from convoy.core.crop_policies import (
    CropPlan,
    CropPolicy,
    CropView,
    MultiscaleCrops,
    SquareCrops,
    crop_views,
    num_slots,
    view_indices,
)

TEN = CropPlan(policy=CropPolicy.TEN)


@pytest.mark.parametrize(
    ("policy", "slots", "views"),
    [("center", 1, 1), ("flip", 2, 2), ("five", 5, 5), ("ten", 6, 10), ("multiscale", 72, 144)],
)
def test_numbers_of_slots_and_views(policy: str, slots: int, views: int) -> None:
    plan = CropPlan(policy=CropPolicy(policy))
    assert num_slots(plan) == slots
    assert len(crop_views(plan)) == views


@pytest.mark.parametrize("policy", CropPolicy)
def test_every_slot_is_seen_and_no_view_twice(policy: CropPolicy) -> None:
    plan = CropPlan(policy=policy)
    views = crop_views(plan)
    assert {view.slot for view in views} == set(range(num_slots(plan)))
    assert len(set(views)) == len(views)


def test_custom_multiscale_counts_scales_squares_crops_and_mirrors() -> None:
    multiscale = MultiscaleCrops(short_sides=(1.0, 1.5), squares=1, crops=SquareCrops.CENTER, mirror=False)
    plan = CropPlan(policy=CropPolicy.MULTISCALE, multiscale=multiscale)
    assert crop_views(plan) == (CropView(0, mirrored=False), CropView(1, mirrored=False))


@pytest.mark.parametrize("short_sides", [(), (0.9,), (1.2, 100.0)])
def test_scales_without_room_for_the_crop_or_of_absurd_size_are_refused(
    short_sides: tuple[float, ...],
) -> None:
    with pytest.raises(ValidationError):
        MultiscaleCrops(short_sides=short_sides)


def test_smaller_policies_stand_among_the_views_of_larger_ones() -> None:
    assert view_indices(CropPolicy.FIVE, TEN) == (0, 1, 2, 3, 4)
    assert view_indices(CropPolicy.CENTER, TEN) == (4,)
    assert view_indices(CropPolicy.FLIP, TEN) == (4, 9)
    assert view_indices(CropPolicy.TEN, TEN) == tuple(range(10))
    assert view_indices(CropPolicy.CENTER, CropPlan(policy=CropPolicy.FLIP)) == (0,)
    assert view_indices(CropPolicy.CENTER, CropPlan(policy=CropPolicy.FIVE)) == (4,)


@pytest.mark.parametrize(
    ("policy", "within"),
    [("ten", "five"), ("flip", "five"), ("flip", "center"), ("center", "multiscale"), ("multiscale", "ten")],
)
def test_views_that_are_not_there_have_no_place(policy: str, within: str) -> None:
    assert view_indices(CropPolicy(policy), CropPlan(policy=CropPolicy(within))) is None
