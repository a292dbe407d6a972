"""Looking into networks whose weights are made by hand, so that it is known what they look for and where."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (the field's name for it)
from torch import Tensor, nn

from convoy.core.errors import ConfigError
from convoy.vision.depth_axis import derive_depth_axis
from convoy.vision.head_config import HeadKind, HeadSpec
from convoy.vision.heads import Head
from convoy.vision.inspection import InspectedNetwork
from convoy.vision.inspection_cam import cam_obstacle, grad_cam
from convoy.vision.inspection_maps import feature_maps, first_filters
from convoy.vision.inspection_maximisation import maximise
from convoy.vision.inspection_options import MaximisationOptions, Unit
from convoy.vision.presets import EvalPreset
from convoy.vision.views import normalise

SIDE_PX = 24
PRESET = EvalPreset(resize_px=None, crop_px=SIDE_PX, mean=(128 / 255,) * 3, std=(0.25,) * 3)
RED, BLUE = 0, 1
GREY = 128


class ColourNetwork(nn.Module):
    """Class 0 is the mean of what is redder than grey, class 1 of what is bluer; one layer works in place."""

    def __init__(self) -> None:
        super().__init__()
        self.colours = nn.Conv2d(3, 2, kernel_size=3, padding=1, bias=False)
        self.mixed = nn.Conv2d(2, 4, kernel_size=3, padding=1, stride=2, bias=False)
        self.inplace = nn.ReLU(inplace=True)
        self.classes = nn.Linear(4, 2, bias=False)
        with torch.no_grad():
            self.colours.weight.zero_()
            self.colours.weight[RED, :, 1, 1] = torch.tensor([1.0, -0.5, -0.5])
            self.colours.weight[BLUE, :, 1, 1] = torch.tensor([-0.5, -0.5, 1.0])
            self.mixed.weight.zero_()
            for channel, (source, weight) in enumerate(((0, 1.0), (0, 0.5), (1, 1.0), (1, 0.5))):
                self.mixed.weight[channel, source] = weight / 9
            self.classes.weight.copy_(torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        maps = F.relu(self.colours(images_BCHW))
        logits: Tensor = self.classes(self.inplace(self.mixed(maps)).mean(dim=(2, 3)))
        return logits


def opened(
    stages: Sequence[str], *, tap: str = "logits", readout: nn.Module | None = None
) -> InspectedNetwork:
    network = ColourNetwork().eval()
    axis = derive_depth_axis(network, input_px=SIDE_PX)
    return InspectedNetwork(network, axis, PRESET, tap=tap, readout=readout, stages=stages)


def image_with_patches(red_xy: tuple[int, int], blue_xy: tuple[int, int] | None = None) -> Tensor:
    """A grey image with a red patch of 6 pixels, and perhaps a blue one."""
    image_CHW = torch.full((3, SIDE_PX, SIDE_PX), GREY, dtype=torch.uint8)
    for channel, patch in ((0, red_xy), (2, blue_xy)):
        if patch is not None:
            x, y = patch
            image_CHW[channel, y : y + 6, x : x + 6] = 255
    return image_CHW


@pytest.mark.parametrize("stage", ["colours", "mixed"])
def test_grad_cam_is_hottest_where_the_only_evidence_is(stage: str) -> None:
    images_BCHW = torch.stack(
        [image_with_patches((2, 14)), image_with_patches((16, 2)), image_with_patches((2, 2), (14, 14))]
    )
    heat_BHW = grad_cam(opened([stage]), images_BCHW, [RED, RED, RED], [stage])[stage]
    assert heat_BHW.shape == (3, SIDE_PX, SIDE_PX)
    for heat_HW, (left, top) in zip(heat_BHW, ((2, 14), (16, 2), (2, 2)), strict=True):
        assert heat_HW.max() == pytest.approx(1, abs=0.05)
        assert heat_HW[top : top + 6, left : left + 6].mean() > 0.6
        outside_HW = heat_HW.clone()
        outside_HW[max(top - 4, 0) : top + 10, max(left - 4, 0) : left + 10] = 0
        assert outside_HW.max() < 0.02


def test_grad_cam_of_another_class_lies_elsewhere_and_of_an_absent_one_nowhere() -> None:
    both = image_with_patches((2, 2), (14, 14))
    heat_BHW = grad_cam(opened(["mixed"]), torch.stack([both, both]), [RED, BLUE], ["mixed"])["mixed"]
    red_part, blue_part = heat_BHW[:, 2:8, 2:8].mean(dim=(1, 2)), heat_BHW[:, 14:20, 14:20].mean(dim=(1, 2))
    assert red_part[0] > 0.6 > blue_part[0] + 0.5
    assert blue_part[1] > 0.6 > red_part[1] + 0.5
    absent = grad_cam(opened(["mixed"]), image_with_patches((2, 2))[None], [BLUE], ["mixed"])["mixed"]
    assert not absent.any()


def test_grad_cam_is_that_of_the_equations_by_hand() -> None:
    images_BCHW = torch.randint(0, 256, (2, 3, SIDE_PX, SIDE_PX), generator=torch.Generator().manual_seed(0))
    images_BCHW = images_BCHW.to(torch.uint8)
    network = ColourNetwork().eval()
    maps_BCHW = F.relu(network.mixed(F.relu(network.colours(normalise(images_BCHW, PRESET))))).detach()
    maps_BCHW.requires_grad_(True)
    network.classes(maps_BCHW.mean(dim=(2, 3)))[:, BLUE].sum().backward()
    assert maps_BCHW.grad is not None
    weights_BC = maps_BCHW.grad.mean(dim=(2, 3))
    heat_BHW = F.relu(torch.einsum("bc,bchw->bhw", weights_BC, maps_BCHW)).detach()
    heat_BHW /= heat_BHW.amax(dim=(1, 2), keepdim=True)
    by_hand = F.interpolate(heat_BHW[:, None], size=(SIDE_PX, SIDE_PX), mode="bilinear")[:, 0]
    found = grad_cam(opened(["mixed"]), images_BCHW, [BLUE, BLUE], ["mixed"])["mixed"]
    torch.testing.assert_close(found, by_hand, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [HeadKind.SOFTMAX, HeadKind.MLP])
def test_grad_cam_goes_through_the_head_of_a_probe(kind: HeadKind) -> None:
    hidden = {"hidden_width": 4} if kind is HeadKind.MLP else {}
    head = Head(HeadSpec(kind=kind, num_features=2, num_classes=2, **hidden)).eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
        head.input_layer.weight[:2, :2] = torch.tensor([[-1.0, 2.0], [2.0, -1.0]])
        if kind is HeadKind.MLP:
            head.layers[-1].weight[:, :2] = torch.eye(2)
    network = opened(["colours"], tap="colours", readout=head)
    both = image_with_patches((2, 2), (14, 14))[None]
    # The head calls blue what the network's own classifier calls red.
    heat_HW = grad_cam(network, both, [0], ["colours"])["colours"][0]
    assert heat_HW[14:20, 14:20].mean() > 0.9
    assert not heat_HW[2:8, 2:8].any()


def test_there_is_no_grad_cam_behind_the_head_nor_of_a_vector() -> None:
    network = opened(["colours", "mixed", "pooled"], tap="colours")
    assert cam_obstacle(network, "colours") is None
    with pytest.raises(ConfigError, match="mixed lies behind the tap colours"):
        grad_cam(network, image_with_patches((2, 2))[None], [RED], ["colours", "mixed"])
    with pytest.raises(ConfigError, match="pooled gives a vector"):
        grad_cam(network, image_with_patches((2, 2))[None], [RED], ["pooled"])


def test_logits_are_those_of_the_network() -> None:
    images_BCHW = torch.stack([image_with_patches((2, 2)), image_with_patches((2, 2), (14, 14))])
    network = opened(["colours", "mixed"])
    logits_BK, activations = network.see(network.pixels(images_BCHW), ["colours"])
    torch.testing.assert_close(logits_BK, ColourNetwork()(normalise(images_BCHW, PRESET)))
    assert activations.keys() == {"colours"}


OPTIONS = MaximisationOptions(steps=100, learning_rate=0.5)


def test_maximised_images_show_what_their_class_is() -> None:
    made = maximise(opened([]), [Unit(index=RED), Unit(index=BLUE)], OPTIONS)
    red, blue = made.images_BCHW.float().mean(dim=(2, 3))
    assert red[0] > red[2] + 20
    assert blue[2] > blue[0] + 20
    assert made.images_BCHW.dtype is torch.uint8


@pytest.mark.parametrize("stage", [None, "mixed", "colours"])
def test_activation_rises_far_above_its_start_and_above_any_noise(stage: str | None) -> None:
    network = opened(["mixed", "colours"])
    made = maximise(network, [Unit(index=index, stage=stage) for index in range(2)], OPTIONS)
    noise_BCHW = torch.rand((64, 3, SIDE_PX, SIDE_PX), generator=torch.Generator().manual_seed(0))
    if stage is None:
        best_K = network.see(noise_BCHW, [])[0].amax(dim=0)
    else:
        best_K = network.see_stage(noise_BCHW, stage).mean(dim=(2, 3)).amax(dim=0)
    for index, (start, end) in enumerate(zip(made.start_B, made.end_B, strict=True)):
        assert end > 1.5 * float(best_K[index])
        assert end > 20 * start


def test_what_is_measured_is_what_is_shown() -> None:
    network = opened([])
    made = maximise(network, [Unit(index=RED)], OPTIONS)
    logits_BK, _ = network.see(network.pixels(made.images_BCHW), [])
    assert float(logits_BK[0, RED]) == pytest.approx(made.end_B[0], rel=1e-4)


def test_maximised_images_depend_on_seed_and_unit_only() -> None:
    network = opened([])
    both = maximise(network, [Unit(index=RED), Unit(index=BLUE)], OPTIONS)
    alone = maximise(network, [Unit(index=BLUE)], OPTIONS)
    again = maximise(network, [Unit(index=RED), Unit(index=BLUE)], OPTIONS)
    assert torch.equal(both.images_BCHW, again.images_BCHW)
    # Batches of other sizes may differ in the last bits of a sum.
    assert (both.images_BCHW[1].int() - alone.images_BCHW[0].int()).abs().float().mean() < 1
    other = maximise(network, [Unit(index=BLUE)], OPTIONS.model_copy(update={"seed": 1}))
    assert not torch.equal(other.images_BCHW, alone.images_BCHW)


def test_total_variation_makes_images_smoother() -> None:
    def roughness(weight: float) -> float:
        options = OPTIONS.model_copy(update={"total_variation": weight, "frequency_decay": 0.0})
        images_BCHW = maximise(opened([]), [Unit(index=RED)], options).images_BCHW.float()
        return float(images_BCHW.diff(dim=2).abs().mean() + images_BCHW.diff(dim=3).abs().mean())

    assert roughness(20.0) < 0.7 * roughness(0.0)


def test_first_filters_are_the_weights_of_the_first_convolution() -> None:
    network = ColourNetwork()
    found = first_filters(network, derive_depth_axis(network, input_px=SIDE_PX))
    assert found.module == "colours"
    torch.testing.assert_close(found.images_FCHW[RED, :, 1, 1], torch.tensor([1.0, -0.5, -0.5]))
    assert found.norms_F == pytest.approx([1.5**0.5, 1.5**0.5])


def test_filters_over_anything_but_colours_are_no_pictures() -> None:
    network = nn.Sequential(
        nn.PixelUnshuffle(2),
        nn.Conv2d(12, 4, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )
    with pytest.raises(ConfigError, match="no pictures"):
        first_filters(network, derive_depth_axis(network, input_px=SIDE_PX))


def test_feature_maps_are_those_of_the_most_active_channels() -> None:
    network = opened(["colours", "mixed"])
    (by_stage,) = feature_maps(network, image_with_patches((2, 2), (14, 14))[None], ["colours", "mixed"], 3)
    # Blue and red patches are equally strong.
    assert set(by_stage["mixed"].channels[:2]) == {0, 2}
    assert list(by_stage["mixed"].means) == sorted(by_stage["mixed"].means, reverse=True)
    assert by_stage["colours"].maps_MHW.shape == (2, SIDE_PX, SIDE_PX)
    assert by_stage["mixed"].maps_MHW.amin() == 0
    assert by_stage["mixed"].maps_MHW.amax() == 1


def test_a_stage_that_is_not_watched_is_refused() -> None:
    network = opened(["colours"])
    with pytest.raises(ConfigError, match="mixed"):
        network.see_stage(network.pixels(image_with_patches((2, 2))[None]), "mixed")
