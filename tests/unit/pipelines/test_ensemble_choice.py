from __future__ import annotations

import numpy as np
import pytest

from convoy.core.crop_policies import CropPolicy
from convoy.core.errors import ConfigError
from convoy.pipelines.ensemble_choice import (
    EnsembleBudget,
    EnsembleChooser,
    EnsembleSettings,
    SelectionMethod,
)
from convoy.vision.ensembling import fit_temperature
from made_ensembles import LABELS_N, made_candidates

NOISES = (1.2, 1.2, 1.5, 3.0)


@pytest.mark.parametrize("method", list(SelectionMethod))
def test_the_ensemble_beats_its_best_single_member(method: SelectionMethod) -> None:
    choice = EnsembleChooser(made_candidates(*NOISES), EnsembleSettings(method=method)).choose()
    single = next(
        point
        for point in choice.front
        if point.members == (choice.best_single,) and point.crops is choice.point.crops
    )
    assert choice.point.top1 > single.top1 + 0.01
    assert choice.point.nll < single.nll
    assert sum(choice.point.weights) == pytest.approx(1)


def test_the_best_single_member_is_the_one_that_is_right_most_often() -> None:
    """The first is right more often, and very sure where it is wrong: its NLL is higher at any temperature."""
    places_N = np.arange(len(LABELS_N))
    often_wrong_N, seldom_wrong_N = places_N % 5 == 0, places_N % 10 == 0
    right_NK, wrong_NK = np.eye(3)[LABELS_N], np.eye(3)[(LABELS_N + 1) % 3]
    accurate_NK = np.where(seldom_wrong_N[:, None], 20 * wrong_NK, 3 * right_NK)
    modest_NK = np.where(often_wrong_N[:, None], 0.1 * wrong_NK, 3 * right_NK)
    candidates = made_candidates(1.0, 1.0, policy=CropPolicy.CENTER)
    candidates.logits_MVNK[:, 0] = np.stack([accurate_NK, modest_NK])
    choice = EnsembleChooser(candidates, EnsembleSettings()).choose()
    accurate, modest = (next(one for one in choice.front if one.members == (place,)) for place in (0, 1))
    assert (accurate.top1, modest.top1) == (0.9, 0.8)
    assert accurate.nll > modest.nll
    assert choice.best_single == 0


def test_two_views_are_better_than_one_and_cost_twice() -> None:
    choice = EnsembleChooser(made_candidates(*NOISES), EnsembleSettings()).choose()
    assert choice.point.crops is CropPolicy.FLIP
    by_members = {(point.members, point.crops): point for point in choice.front}
    center, flip = by_members[(0,), CropPolicy.CENTER], by_members[(0,), CropPolicy.FLIP]
    assert flip.nll < center.nll
    assert flip.passes_per_image == 2 * center.passes_per_image == 2
    assert center.images_per_s == pytest.approx(100)
    assert flip.images_per_s == pytest.approx(50)


def test_an_image_is_decoded_once_for_all_crops_and_members() -> None:
    candidates = made_candidates(*NOISES, seconds_once=0.05)
    front = EnsembleChooser(candidates, EnsembleSettings()).choose().front
    by_members = {(point.members, point.crops): point for point in front}
    assert by_members[(0,), CropPolicy.CENTER].images_per_s == pytest.approx(1 / 0.06)
    assert by_members[(0,), CropPolicy.FLIP].images_per_s == pytest.approx(1 / 0.07)
    for point in front:
        assert 1 / point.images_per_s == pytest.approx(0.05 + 0.01 * point.passes_per_image)
    ten_kept = EnsembleChooser(
        made_candidates(1.2, 1.5, policy=CropPolicy.TEN, seconds_once=0.05),
        EnsembleSettings(crops=(CropPolicy.TEN,)),
    )
    assert ten_kept.seconds_per_image([0, 1], CropPolicy.FLIP) == pytest.approx(0.05 + 0.01 * 2 * 2)


def test_the_budget_itself_is_searched_less_what_decoding_takes() -> None:
    """Two of six networks cost 70 ms together, which no other budget tries; 30 ms more go to the image."""
    seconds = (0.01, 0.05, 0.09, 0.02, 0.02, 0.02)
    candidates = made_candidates(
        1.5, 1.0, 0.8, 1.0, 2.0, 2.0, policy=CropPolicy.CENTER, seconds=seconds, seconds_once=0.03
    )
    settings = EnsembleSettings(budget=EnsembleBudget(min_images_per_s=10))
    of_budget = {point.members for point in EnsembleChooser(candidates, settings).choose().front}
    of_all = {point.members for point in EnsembleChooser(candidates, EnsembleSettings()).choose().front}
    assert of_budget - of_all == {(1, 3)}


def test_the_best_points_rise_with_their_cost() -> None:
    front = EnsembleChooser(made_candidates(*NOISES), EnsembleSettings()).choose().front
    best = [point for point in front if point.is_best]
    assert best[0] == front[0]
    assert [point.top1 for point in best] == sorted({point.top1 for point in best})
    assert [point.images_per_s for point in best] == sorted(
        (point.images_per_s for point in best), reverse=True
    )
    assert max(point.top1 for point in front) == best[-1].top1


def test_a_budget_is_kept() -> None:
    settings = EnsembleSettings(budget=EnsembleBudget(min_images_per_s=40))
    point = EnsembleChooser(made_candidates(*NOISES), settings).choose().point
    assert point.images_per_s >= 40
    assert point.passes_per_image <= 2
    dear = EnsembleSettings(budget=EnsembleBudget(max_usd_per_million=30, price_per_hour=3.6))
    point = EnsembleChooser(made_candidates(*NOISES), dear).choose().point
    # A pass of 10 ms at 3.60 an hour is 10 a million.
    assert point.usd_per_million == pytest.approx(10 * point.passes_per_image)
    assert point.passes_per_image <= 3


def test_a_budget_that_nothing_keeps_names_the_cheapest() -> None:
    settings = EnsembleSettings(budget=EnsembleBudget(min_images_per_s=1000))
    with pytest.raises(ConfigError, match=r"the cheapest gives 100\.0 images/s"):
        EnsembleChooser(made_candidates(*NOISES), settings).choose()


def test_at_most_so_many_members_are_taken() -> None:
    settings = EnsembleSettings(max_members=2)
    front = EnsembleChooser(made_candidates(*NOISES), settings).choose().front
    assert max(len(point.members) for point in front) == 2


def test_crops_that_were_not_kept_are_refused() -> None:
    settings = EnsembleSettings(crops=(CropPolicy.TEN,))
    with pytest.raises(ConfigError, match="keep no views of ten: they hold center, flip"):
        EnsembleChooser(made_candidates(1.0, 1.0), settings)


def test_ten_crops_hold_the_smaller_policies() -> None:
    candidates = made_candidates(1.2, 1.5, policy=CropPolicy.TEN)
    front = EnsembleChooser(candidates, EnsembleSettings()).choose().front
    assert {point.crops for point in front} == {
        CropPolicy.CENTER,
        CropPolicy.FLIP,
        CropPolicy.FIVE,
        CropPolicy.TEN,
    }


def test_a_member_that_is_too_sure_gets_a_temperature_above_one() -> None:
    candidates = made_candidates(1.2, 1.2)
    candidates.logits_MVNK[1] *= 10
    first, second = EnsembleChooser(candidates, EnsembleSettings()).temperatures(CropPolicy.FLIP)
    assert second == pytest.approx(10 * first, rel=0.05) or second > 5
    raw = EnsembleChooser(candidates, EnsembleSettings(calibrate=False))
    assert raw.temperatures(CropPolicy.FLIP) == (1.0, 1.0)


def test_a_temperature_is_that_of_the_crops_it_is_used_at() -> None:
    """A mirror view that is too sure says nothing of the centre view alone."""
    candidates = made_candidates(1.2)
    candidates.logits_MVNK[:, 1] *= 10
    chooser = EnsembleChooser(candidates, EnsembleSettings())
    (center,), (flip,) = (chooser.temperatures(policy) for policy in (CropPolicy.CENTER, CropPolicy.FLIP))
    assert center == pytest.approx(fit_temperature(candidates.logits_MVNK[0, 0], LABELS_N), rel=0.01)
    assert flip > 1.2 * center


def test_more_crops_are_not_held_back_by_the_modesty_of_a_mean() -> None:
    """Averages of calibrated outputs are less sure than they are right: a temperature makes up for that."""
    choice = EnsembleChooser(
        made_candidates(1.2, 1.2, 1.3, policy=CropPolicy.TEN), EnsembleSettings()
    ).choose()
    assert choice.temperature < 0.9
    assert choice.point.crops is CropPolicy.TEN
    assert choice.point.nll == min(point.nll for point in choice.front)
    assert choice.point in choice.front


def test_a_single_candidate_is_an_ensemble_of_one() -> None:
    choice = EnsembleChooser(made_candidates(1.0), EnsembleSettings()).choose()
    assert choice.point.members == (0,)
    assert choice.point.weights == (1.0,)
    assert len(LABELS_N) == 500
    assert np.isfinite(choice.temperature)
