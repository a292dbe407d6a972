from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import RandAugment, TrivialAugmentWide

from convoy.core.errors import ConfigError
from convoy.core.randomness import generator
from convoy.core.records import SampleRejected
from convoy.vision.augmentation import augment
from convoy.vision.augmentation_colour import pca_shift, shift_colours
from convoy.vision.augmentation_geometry import elastic_field, warp_affine
from convoy.vision.augmentation_policy import AugmentationPolicy, AutomaticKind, Elastic, PcaBasis
from convoy.vision.automatic_augmentation import Operation, magnitude
from convoy.vision.presets import EvalPreset
from image_files import photo

SIDE_PX = 48
PRESET = EvalPreset(resize_px=None, crop_px=SIDE_PX, mean=(0.5, 0.25, 0.75))
FILL = (128, 64, 191)
ON_BLACK = PRESET.model_copy(update={"mean": (0.0, 0.0, 0.0)})
BASIS = PcaBasis(
    eigenvalues=(0.2, 0.02, 0.004), eigenvectors=((0.6, 0.6, 0.529), (0.8, -0.6, 0), (0, 0.6, -0.8))
)
# Every kind at once, each always drawn.
EVERYTHING: dict[str, Any] = {
    "crop": {"kind": "random", "padding_px": 6, "padding": "reflect"},
    "mirror": {"probability": 0.5},
    "rotation": {"degrees": 20},
    "shear": {"degrees": 10},
    "perspective": {"distortion": 0.3},
    "elastic": {"displacement_px": 2, "sigma_px": 4},
    "automatic": {"kind": "rand_augment", "num_ops": 3},
    "colour_jitter": {"hue": 0.1},
    "colour_shift": {"levels": 20},
    "pca_colour": {"basis": BASIS},
    "grey": {"probability": 0.3},
    "erasing": {"probability": 1},
}
WEAKLESS: dict[str, dict[str, Any]] = {
    "mirror": {"probability": 0},
    "rotation": {"degrees": 0},
    "shear": {"degrees": 0},
    "perspective": {"distortion": 0},
    "elastic": {"displacement_px": 0},
    "automatic": {"kind": "rand_augment", "num_ops": 0},
    "colour_jitter": {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0},
    "colour_shift": {"levels": 0},
    "pca_colour": {"strength": 0},
    "grey": {"probability": 0},
    "erasing": {"probability": 0},
}


def pixels(height_px: int = SIDE_PX, width_px: int = SIDE_PX, seed: int = 0) -> torch.Tensor:
    """An image in the memory layout of `decode_image`."""
    return torch.from_numpy(photo(height_px, width_px, seed)).permute(2, 0, 1)


def policy_of(**sections: Any) -> AugmentationPolicy:
    """The whole image and these sections."""
    return AugmentationPolicy.model_validate({"base": "none", **sections})


def drawn(
    image_CHW: torch.Tensor, policy: AugmentationPolicy, draw: int = 0, preset: EvalPreset = PRESET
) -> torch.Tensor:
    out_CHW = torch.empty(3, preset.crop_px, preset.crop_px, dtype=torch.uint8)
    augment(image_CHW, preset, out_CHW, policy=policy, rng=generator(policy.seed, draw))
    return out_CHW


def test_draws_are_the_same_in_any_thread_and_order() -> None:
    images = [pixels(60, 70, seed) for seed in range(4)]
    jobs = [(image, draw) for image in range(4) for draw in range(10)]
    policy = policy_of(**EVERYTHING)
    expected = {job: drawn(images[job[0]], policy, job[1]) for job in jobs}
    torch.manual_seed(5)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda job: drawn(images[job[0]], policy, job[1]), reversed(jobs)))
    assert all(torch.equal(expected[job], image) for job, image in zip(reversed(jobs), found, strict=True))
    assert len({image.numpy().tobytes() for image in found}) == len(jobs)


def test_global_generators_are_left_alone() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    drawn(pixels(60, 70), policy_of(**EVERYTHING))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()


def test_memory_layouts_do_not_change_pixels_and_the_image_stays() -> None:
    image = pixels(60, 70)
    kept = image.clone()
    policy = policy_of(**EVERYTHING)
    for draw in range(20):
        batch = torch.zeros(2, 3, SIDE_PX, SIDE_PX, dtype=torch.uint8)
        batch = batch.contiguous(memory_format=torch.channels_last)
        augment(image, PRESET, batch[1], policy=policy, rng=generator(0, draw))
        assert torch.equal(batch[1], drawn(image.contiguous(), policy, draw))
    assert torch.equal(image, kept)


@pytest.mark.parametrize("kind", WEAKLESS)
def test_strength_zero_is_the_identity(kind: str) -> None:
    image = pixels()
    policy = policy_of(**{kind: WEAKLESS[kind]})
    assert all(torch.equal(drawn(image, policy, draw), image) for draw in range(5))


@pytest.mark.parametrize("kind", [kind for kind in WEAKLESS if kind not in ("mirror", "grey", "erasing")])
def test_probability_is_the_share_of_images_that_change(kind: str) -> None:
    image = pixels()
    policy = policy_of(**{kind: {**EVERYTHING[kind], "probability": 0.3}})
    share = np.mean([not torch.equal(drawn(image, policy, draw), image) for draw in range(200)])
    assert 0.15 < share < 0.42


def test_mirror_probability_mirrors_that_share() -> None:
    image = pixels()
    for probability in (0.0, 0.3, 1.0):
        views = [drawn(image, policy_of(mirror={"probability": probability}), draw) for draw in range(200)]
        assert all(torch.equal(view, image) or torch.equal(view, image.flip(-1)) for view in views)
        share = np.mean([torch.equal(view, image.flip(-1)) for view in views])
        assert abs(share - probability) < 0.15 * (0 < probability < 1) + 1e-9


def test_padded_crop_shows_every_place_of_the_padded_image() -> None:
    image = pixels()
    for padding, mode in (("black", "constant"), ("reflect", "reflect")):
        padded = torch.nn.functional.pad(image[None].float(), (2,) * 4, mode=mode)[0].to(torch.uint8)
        places = {
            padded[:, top : top + SIDE_PX, left : left + SIDE_PX].numpy().tobytes()
            for top in range(5)
            for left in range(5)
        }
        policy = policy_of(crop={"kind": "random", "padding_px": 2, "padding": padding})
        assert {drawn(image, policy, draw).numpy().tobytes() for draw in range(300)} == places


def test_random_crop_of_a_larger_image_is_cut_from_the_resized_image() -> None:
    image = pixels(60, 80)
    preset = EvalPreset(resize_px=60, crop_px=SIDE_PX)
    windows = image.unfold(1, SIDE_PX, 1).unfold(2, SIDE_PX, 1)
    policy = policy_of(crop={"kind": "random", "padding_px": 0})
    for draw in range(10):
        crop = drawn(image, policy, draw, preset)
        assert (windows == crop[:, None, None]).all(dim=(0, 3, 4)).any()


def test_reflection_may_be_wider_than_the_image() -> None:
    preset = EvalPreset(resize_px=None, crop_px=2)
    policy = policy_of(crop={"kind": "random", "padding_px": 5, "padding": "reflect"})
    image = torch.tensor([[0, 100], [150, 250]], dtype=torch.uint8).expand(3, 2, 2)
    assert all(
        set(drawn(image, policy, draw, preset).unique().tolist()) <= {0, 100, 150, 250} for draw in range(20)
    )


def test_image_below_the_crop_is_too_small_for_every_crop() -> None:
    for kind in ("random_resized", "random", "eval"):
        with pytest.raises(SampleRejected):
            drawn(pixels(SIDE_PX - 1, 80), policy_of(crop={"kind": kind}))


def test_positive_rotation_is_clockwise_and_a_quarter_turn_is_exact() -> None:
    turned = warp_affine(pixels(), rotation_degrees=90.0, fill_C=FILL)
    assert torch.equal(turned, torch.rot90(pixels(), -1, (1, 2)))


def test_positive_shear_moves_the_upper_half_right_and_uncovers_the_fill_colour() -> None:
    image = torch.zeros(3, SIDE_PX, SIDE_PX, dtype=torch.uint8)
    image[:, :, 24] = 255
    sheared = warp_affine(image, shear_degrees=30.0, fill_C=FILL)
    brightest = sheared[0, :, 12:36].argmax(dim=1) + 12
    tangent = np.tan(np.radians(30))
    for row in (8, 23, 40):
        assert abs(float(brightest[row]) - (24 + tangent * (23.5 - row))) < 1
    assert tuple(sheared[:, 0, 0].tolist()) == FILL


def test_border_blends_into_the_fill_colour_without_a_dark_line() -> None:
    bright = torch.full((3, SIDE_PX, SIDE_PX), 250, dtype=torch.uint8)
    lowest = torch.tensor(FILL, dtype=torch.uint8).view(3, 1, 1)
    for sections in (
        {"rotation": {"degrees": 30}, "shear": {"degrees": 20}},
        {"perspective": {"distortion": 0.5}},
        {"elastic": {"displacement_px": 3}},
    ):
        views = torch.stack([drawn(bright, policy_of(**sections), draw) for draw in range(10)])
        assert (views >= lowest).all()
        assert (views <= 250).all()
        assert (views == lowest).all(dim=1).any()


@pytest.mark.parametrize("kind", ["rotation", "shear"])
def test_rotation_and_shear_reach_their_degrees_both_ways_and_no_further(kind: str) -> None:
    upright = torch.zeros(3, SIDE_PX, SIDE_PX, dtype=torch.uint8)
    upright[:, :, 23:25] = 255
    slopes = []
    for draw in range(60):
        tilted_HW = drawn(upright, policy_of(**{kind: {"degrees": 20}}), draw, ON_BLACK)[0, 8:40].double()
        centres_H = (tilted_HW * torch.arange(SIDE_PX)).sum(1) / tilted_HW.sum(1)
        slopes.append(np.degrees(np.arctan(np.polyfit(np.arange(32), centres_H.numpy(), 1)[0])))
    assert -20.5 < min(slopes) < -15
    assert 15 < max(slopes) < 20.5


def test_perspective_keeps_the_centre_and_shrinks_the_borders() -> None:
    image = torch.full((3, SIDE_PX, SIDE_PX), 255, dtype=torch.uint8)
    fill = torch.tensor(FILL, dtype=torch.uint8)
    corners = 0
    for draw in range(20):
        view = drawn(image, policy_of(perspective={"distortion": 0.5}), draw)
        assert (view[:, 20:28, 20:28] == 255).all()
        corners += int((view[:, 0, 0] == fill).all())
    assert corners > 10


def test_elastic_field_has_the_declared_strength_and_is_smooth() -> None:
    section = Elastic(displacement_px=3, sigma_px=5)
    fields = np.stack([elastic_field(96, 96, section, generator(0, draw)) for draw in range(20)])
    # At the borders as within.
    for part in (fields, fields[..., :8], fields[..., :8, -8:]):
        assert abs(np.sqrt(np.mean(part**2)) - 3) < 0.45
    # For a Gaussian of sigma, neighbours at distance d correlate by exp(-d^2 / (4 sigma^2)).
    for distance, correlation in ((5, np.exp(-0.25)), (25, 0.0)):
        near, far = fields[..., :-distance], fields[..., distance:]
        assert abs(np.mean(near * far) / np.mean(fields**2) - correlation) < 0.12


def test_elastic_moves_each_place_its_own_way_and_by_little() -> None:
    dots = torch.zeros(3, SIDE_PX, SIDE_PX, dtype=torch.uint8)
    dots[:, 11:14, 11:14] = dots[:, 35:38, 35:38] = 255
    policy = policy_of(elastic={"displacement_px": 1.5, "sigma_px": 4})
    moves = []
    for draw in range(40):
        view_HW = drawn(dots, policy, draw, ON_BLACK)[0].double()
        for cell_HW in (view_HW[:24, :24], view_HW[24:, 24:]):
            indices = torch.arange(24).double()
            centre = [float((cell_HW.sum(axis) * indices).sum() / cell_HW.sum()) - 12 for axis in (1, 0)]
            moves.append(centre)
    found_NKD = np.array(moves).reshape(40, 2, 2)
    assert 1.0 < np.sqrt((found_NKD**2).mean()) < 2.0
    assert np.abs(found_NKD).max() < 7
    together = np.corrcoef(found_NKD[:, 0].ravel(), found_NKD[:, 1].ravel())[0, 1]
    assert abs(together) < 0.35


def test_colour_shift_adds_one_constant_a_channel_and_clips() -> None:
    image = torch.tensor([0, 100, 250], dtype=torch.uint8).view(1, 1, 3).expand(3, 1, 3)
    shifted = shift_colours(image, np.array([10.4, -20.0, 0.0]))
    assert shifted[:, 0].tolist() == [[10, 110, 255], [0, 80, 230], [0, 100, 250]]
    grey = torch.full((3, SIDE_PX, SIDE_PX), 128, dtype=torch.uint8)
    for draw in range(50):
        view = drawn(grey, policy_of(colour_shift={"levels": 20}), draw)
        assert all(len(channel.unique()) == 1 for channel in view)
        assert (view.int() - 128).abs().max() <= 20


def test_pca_shift_is_the_formula_of_krizhevsky_2012() -> None:
    alphas = np.array([0.1, -0.2, 0.05])
    expected = np.zeros(3)
    for vector, value, alpha in zip(BASIS.eigenvectors, BASIS.eigenvalues, alphas, strict=True):
        expected += np.array(vector) * alpha * value
    assert np.allclose(pca_shift(BASIS, alphas), 255 * expected)


def test_pca_colour_has_the_covariance_that_the_formula_implies() -> None:
    grey = torch.full((3, SIDE_PX, SIDE_PX), 128, dtype=torch.uint8)
    policy = policy_of(pca_colour={"strength": 0.5, "basis": BASIS})
    views = torch.stack([drawn(grey, policy, draw) for draw in range(1500)])
    assert (views == views[:, :, :1, :1]).all()
    shifts = views[:, :, 0, 0].double().numpy() - 128
    components = 255 * np.array(BASIS.eigenvectors).T * np.array(BASIS.eigenvalues) * 0.5
    expected = components @ components.T
    assert np.abs(np.cov(shifts.T) - expected).max() < 0.12 * expected.max()
    assert np.abs(shifts.mean(axis=0)).max() < 1.5


def test_pca_colour_without_basis_names_the_command_that_fits_it() -> None:
    with pytest.raises(ConfigError, match="convoy cache"):
        drawn(pixels(), policy_of(pca_colour={}))


def test_jitter_changes_brightness_within_its_factor() -> None:
    grey = torch.full((3, SIDE_PX, SIDE_PX), 100, dtype=torch.uint8)
    strengths = {"brightness": 0.3, "contrast": 0, "saturation": 0}
    levels = {int(drawn(grey, policy_of(colour_jitter=strengths), draw)[0, 0, 0]) for draw in range(100)}
    assert 70 <= min(levels) < 76
    assert 124 < max(levels) <= 130


def test_grey_has_equal_channels() -> None:
    view = drawn(pixels(), policy_of(grey={"probability": 1}))
    assert torch.equal(view[0], view[1])
    assert torch.equal(view[0], view[2])


def test_erasing_covers_its_share_of_the_area_with_the_mean_colour() -> None:
    image = torch.full((3, SIDE_PX, SIDE_PX), 255, dtype=torch.uint8)
    policy = policy_of(erasing={"probability": 1, "area": (0.1, 0.3), "aspect": (0.5, 2)})
    for draw in range(50):
        erased = (drawn(image, policy, draw) == torch.tensor(FILL, dtype=torch.uint8).view(3, 1, 1)).all(
            dim=0
        )
        assert 0.085 < erased.double().mean() < 0.33
        rows, columns = erased.any(dim=1).sum(), erased.any(dim=0).sum()
        assert rows * columns == erased.sum()


@pytest.mark.parametrize(
    ("kind", "reference"),
    [(AutomaticKind.RAND_AUGMENT, RandAugment), (AutomaticKind.TRIVIAL_AUGMENT, TrivialAugmentWide)],
)
def test_automatic_operations_and_magnitudes_are_torchvisions(kind: AutomaticKind, reference: Any) -> None:
    assert [operation.value for operation in Operation] == list(reference._AUGMENTATION_SPACE)
    for operation in Operation:
        theirs, _ = reference._AUGMENTATION_SPACE[operation.value]
        levels = theirs(31, 224, 224)
        expected = [0.0] * 31 if levels is None else [float(level) for level in levels]
        assert np.allclose([magnitude(kind, operation, step, 224) for step in range(31)], expected, atol=1e-5)


@pytest.mark.parametrize("kind", AutomaticKind)
def test_automatic_policies_draw_many_different_images(kind: AutomaticKind) -> None:
    policy = policy_of(automatic={"kind": kind})
    assert len({drawn(pixels(), policy, draw).numpy().tobytes() for draw in range(60)}) > 40
