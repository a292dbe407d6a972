from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from convoy.core.errors import ConfigError
from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.backbones import build_network, depth_axis
from convoy.vision.freezing import (
    automatic_freeze_depth,
    freeze,
    frozen_stages,
    resolve_freeze_depth,
    set_train_mode,
    trains_the_same,
)
from convoy.vision.optimisation import build_optimiser
from convoy.vision.stages import DepthAxis
from convoy.vision.training_config import Optimiser, Phase

# Each with an input size that leaves maps for its BatchNorms.
INPUT_PX = {
    "lenet5": 32,
    "cifar_resnet20": 32,
    "torchvision:resnet18": 64,
    "torchvision:vgg11_bn": 32,
    "torchvision:densenet121": 64,
    "torchvision:mobilenet_v2": 64,
    "torchvision:efficientnet_b0": 64,
    "torchvision:convnext_tiny": 64,
    "torchvision:googlenet": 64,
    "timm:xception41": 96,
}
BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


@pytest.fixture(scope="module", params=INPUT_PX)
def known(request: pytest.FixtureRequest) -> tuple[nn.Module, DepthAxis, Tensor]:
    config = BackboneConfig(arch=request.param, weights="random", num_classes=5)
    network = build_network(config)
    px = INPUT_PX[request.param]
    return network, depth_axis(config, network), torch.randn(3, 3, px, px, generator=torch.manual_seed(0))


def depths(axis: DepthAxis) -> list[int]:
    """Every depth of a small network; of a large one the ends, and some in the middle."""
    most = len(axis) - 1
    if sum(stage.num_parameters for stage in axis) > 100e6:
        return [most // 2, most]
    return list(range(most + 1)) if most < 12 else [0, 1, most // 2, most - 2, most]


def train_once(network: nn.Module, axis: DepthAxis, depth: int, images_BCHW: Tensor) -> torch.optim.Optimizer:
    """A backward pass in the mode of training, with one freeze depth; gradients stay."""
    freeze(network, axis, depth)
    set_train_mode(network, axis, depth)
    phase = Phase(name="train", epochs=1, freeze_depth=depth, learning_rate=1e-4)
    optimiser = build_optimiser(network, axis, phase, Optimiser(weight_decay=0.1))
    optimiser.zero_grad(set_to_none=True)
    for parameter in network.parameters():
        parameter.grad = None
    nn.functional.cross_entropy(network(images_BCHW), torch.tensor([0, 3, 4])).backward()
    return optimiser


def test_exactly_the_later_stages_get_gradients_and_nothing_frozen_moves(
    known: tuple[nn.Module, DepthAxis, Tensor],
) -> None:
    network, axis, images_BCHW = known
    for depth in depths(axis):
        torch.manual_seed(depth)
        before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
        optimiser = train_once(network, axis, depth, images_BCHW)
        expected = {name for stage in axis.stages[depth:] for name in stage.parameter_names}
        assert {name for name, one in network.named_parameters() if one.grad is not None} == expected
        optimiser.step()
        moved = {name for name, one in network.named_parameters() if not torch.equal(one, before[name])}
        assert moved <= expected
        # With weight decay every weight of a trainable stage moves.
        assert moved >= {name for name in expected if before[name].ndim > 1}


def test_frozen_batchnorm_keeps_its_statistics_and_trainable_batchnorm_moves(
    known: tuple[nn.Module, DepthAxis, Tensor],
) -> None:
    network, axis, images_BCHW = known
    norms = {name: one for name, one in network.named_modules() if isinstance(one, BATCHNORMS)}
    for depth in depths(axis):
        trainable = {name for stage in axis.stages[depth:] for name in stage.parameter_names}
        before = {name: (norm.running_mean.clone(), norm.running_var.clone()) for name, norm in norms.items()}
        train_once(network, axis, depth, images_BCHW)
        for name, norm in norms.items():
            mean, var = before[name]
            kept = torch.equal(norm.running_mean, mean) and torch.equal(norm.running_var, var)
            assert kept != (f"{name}.weight" in trainable), name


@pytest.mark.parametrize(
    ("arch", "dropouts"),
    [
        # The first of VGG lies between two frozen layers.
        ("torchvision:vgg11_bn", [False, True]),
        # Here it is part of `pooled`.
        ("torchvision:efficientnet_b0", [True]),
        ("torchvision:squeezenet1_1", [True]),
    ],
)
def test_frozen_stages_are_in_eval_mode_but_for_the_dropout_of_what_trains(
    arch: str, dropouts: list[bool]
) -> None:
    config = BackboneConfig(arch=arch, weights="random", num_classes=5)
    network = build_network(config)
    axis = depth_axis(config, network)
    body = [name for stage in axis.stages[:-1] for name in stage.module_names]
    set_train_mode(network, axis, len(axis) - 1)
    assert [one.training for one in network.modules() if isinstance(one, nn.Dropout)] == dropouts
    frozen = [one for name in body for one in network.get_submodule(name).modules()]
    assert not any(one.training for one in frozen if not isinstance(one, nn.Dropout))
    set_train_mode(network, axis, 0)
    assert all(module.training for module in network.modules())


@pytest.fixture(scope="module")
def resnet_axis() -> DepthAxis:
    config = BackboneConfig(arch="cifar_resnet20", weights="random")
    return depth_axis(config, build_network(config))


@pytest.mark.parametrize(
    ("wanted", "depth"),
    [(0, 0), (3, 3), (11, 11), ("body", 11), ("stem", 1), ("layer1", 4), ("layer2.0", 5), ("pooled", 11)],
)
def test_a_freeze_depth_is_a_number_a_stage_or_the_body(
    resnet_axis: DepthAxis, wanted: int | str, depth: int
) -> None:
    assert resolve_freeze_depth(resnet_axis, wanted, images_per_class=100) == depth


def test_auto_follows_the_images(resnet_axis: DepthAxis) -> None:
    found = [resolve_freeze_depth(resnet_axis, "auto", images_per_class=n) for n in (5, 141, 5000)]
    assert found == [11, automatic_freeze_depth(10, 141), 0]
    assert 0 < found[1] < 11


def test_auto_trains_all_weights_or_the_head_alone_but_never_a_pooling(resnet_axis: DepthAxis) -> None:
    """The last stage of the body has no weights: freezing all but that one would train the head alone unsaid."""
    depths = {resolve_freeze_depth(resnet_axis, "auto", images_per_class=n) for n in range(1, 1001)}
    assert depths == {*range(10), 11}
    assert trains_the_same(resnet_axis, 10, 11)
    assert not trains_the_same(resnet_axis, 9, 11)


@pytest.mark.parametrize("wanted", [-1, 12, "logits", "linear"])
def test_a_depth_that_leaves_nothing_to_train_is_an_error(resnet_axis: DepthAxis, wanted: int | str) -> None:
    with pytest.raises(ConfigError, match="is impossible: the network has 12 stages"):
        resolve_freeze_depth(resnet_axis, wanted, images_per_class=100)


@pytest.mark.parametrize(("wanted", "num_learnt"), [(1, 0), ("body", 0), ("layer3", 4), (5, 4)])
def test_random_weights_are_not_frozen(resnet_axis: DepthAxis, wanted: int | str, num_learnt: int) -> None:
    with pytest.raises(ConfigError, match=f"would keep random weights: {num_learnt} of 12 stages") as caught:
        resolve_freeze_depth(resnet_axis, wanted, images_per_class=100, num_learnt=num_learnt)
    assert caught.value.where == "freeze_depth"


@pytest.mark.parametrize(("wanted", "depth"), [("auto", 4), ("layer1", 4), (0, 0)])
def test_what_was_learnt_may_be_frozen_and_auto_freezes_no_more(
    resnet_axis: DepthAxis, wanted: int | str, depth: int
) -> None:
    assert resolve_freeze_depth(resnet_axis, wanted, images_per_class=5, num_learnt=4) == depth


def test_an_unknown_stage_is_an_error_that_names_the_nearest(resnet_axis: DepthAxis) -> None:
    with pytest.raises(ConfigError, match=r"layer3\.2"):
        resolve_freeze_depth(resnet_axis, "layer3.9", images_per_class=100)
    with pytest.raises(ConfigError) as caught:
        resolve_freeze_depth(resnet_axis, "layer9", images_per_class=100)
    assert caught.value.where == "freeze_depth"


def test_an_unresolved_phase_is_an_error() -> None:
    phase = Phase(name="head", epochs=1, freeze_depth="auto", learning_rate=0.1)
    with pytest.raises(ConfigError, match="'auto' was not resolved"):
        frozen_stages(phase)


def test_automatic_depth_falls_from_all_at_20_images_to_none_at_1000() -> None:
    numbers = [0, 1, 20, 21, 50, 100, 141.5, 200, 500, 900, 1000, 1e6]
    found = [automatic_freeze_depth(17, n) for n in numbers]
    assert found == sorted(found, reverse=True)
    assert found[:3] == [17, 17, 17]
    assert found[-2:] == [0, 0]
    # The geometric mean of the two ends lies half way.
    assert automatic_freeze_depth(20, (20 * 1000) ** 0.5) == 10
