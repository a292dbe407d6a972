from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR, OneCycleLR

from convoy.core.config import load_config
from convoy.core.errors import ConfigError, DataError
from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.backbones import build_network, depth_axis
from convoy.vision.depth_axis import derive_depth_axis
from convoy.vision.freezing import freeze
from convoy.vision.optimisation import (
    build_optimiser,
    load_optimiser_tensors,
    optimiser_tensors,
    schedule_factor,
    set_rate,
    stage_rate,
)
from convoy.vision.stages import DepthAxis
from convoy.vision.training_config import Optimiser, OptimiserKind, Phase, Schedule, ScheduleKind
from convoy.vision.weights import read_state_dict, state_to_safetensors

OPTIMISERS = {
    "sgd": Optimiser(),
    "plain_sgd": Optimiser(momentum=0.0),
    "adamw": Optimiser(kind=OptimiserKind.ADAMW, betas=(0.8, 0.99), weight_decay=0.05),
}


@pytest.fixture
def resnet() -> tuple[nn.Module, DepthAxis]:
    config = BackboneConfig(arch="cifar_resnet20", weights="random")
    network = build_network(config)
    return network, depth_axis(config, network)


def phase(depth: int = 0, **settings: float) -> Phase:
    return Phase(name="train", epochs=1, freeze_depth=depth, **{"learning_rate": 0.5, **settings})


def test_norms_and_biases_have_no_weight_decay_and_every_parameter_is_in_one_group(
    resnet: tuple[nn.Module, DepthAxis],
) -> None:
    network, axis = resnet
    optimiser = build_optimiser(network, axis, phase(), Optimiser(weight_decay=0.3))
    for group in optimiser.param_groups:
        assert {parameter.ndim > 1 for parameter in group["params"]} == {group["weight_decay"] == 0.3}
        assert group["weight_decay"] in (0.0, 0.3)
    members = [id(parameter) for group in optimiser.param_groups for parameter in group["params"]]
    assert sorted(members) == sorted(id(parameter) for parameter in network.parameters())


def decayed(network: nn.Module, axis: DepthAxis) -> set[str]:
    """The names of the parameters with weight decay."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    optimiser = build_optimiser(network, axis, phase(), Optimiser(weight_decay=0.3))
    return {
        names[id(one)] for group in optimiser.param_groups if group["weight_decay"] for one in group["params"]
    }


@pytest.mark.parametrize(
    ("arch", "scale"), [("torchvision:convnext_tiny", "layer_scale"), ("timm:nf_regnet_b0", "gain")]
)
def test_scales_with_the_dimensions_of_maps_have_no_weight_decay(arch: str, scale: str) -> None:
    config = BackboneConfig(arch=arch, weights="random", num_classes=3)
    network = build_network(config)
    found = decayed(network, depth_axis(config, network))
    scales = {
        name for name, parameter in network.named_parameters() if name.endswith(scale) and parameter.ndim > 1
    }
    assert scales
    assert not scales & found
    kernels = {
        f"{name}.weight"
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }
    assert found == kernels


def test_kernels_with_one_dimension_above_one_have_weight_decay() -> None:
    """A squeeze to one channel, and a depthwise convolution of one pixel."""
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.Conv2d(4, 4, 1, groups=4),
        nn.Conv2d(4, 1, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(1, 5),
    )
    assert decayed(network, derive_depth_axis(network, input_px=16)) == {
        "0.weight",
        "1.weight",
        "2.weight",
        "5.weight",
    }


def test_frozen_parameters_are_in_no_group(resnet: tuple[nn.Module, DepthAxis]) -> None:
    network, axis = resnet
    freeze(network, axis, 7)
    optimiser = build_optimiser(network, axis, phase(7), Optimiser())
    members = {id(parameter) for group in optimiser.param_groups for parameter in group["params"]}
    assert members == {
        id(network.get_parameter(name)) for stage in axis.stages[7:] for name in stage.parameter_names
    }


@pytest.mark.parametrize("betas", [(0.9, 1.0), (-0.1, 0.999)])
def test_betas_that_torch_would_refuse_are_refused_in_the_config(betas: tuple[float, float]) -> None:
    with pytest.raises(ValidationError, match="betas"):
        Optimiser(kind=OptimiserKind.ADAMW, betas=betas)


def test_rates_fall_with_the_depth_below_the_head(resnet: tuple[nn.Module, DepthAxis]) -> None:
    network, axis = resnet
    optimiser = build_optimiser(network, axis, phase(body_rate=0.1, layer_decay=0.5), Optimiser())
    by_parameter = {
        id(parameter): group["lr"] for group in optimiser.param_groups for parameter in group["params"]
    }
    last = len(axis) - 1
    for stage in axis:
        expected = 0.5 if stage.index == last else 0.5 * 0.1 * 0.5 ** (last - stage.index)
        for name in stage.parameter_names:
            assert by_parameter[id(network.get_parameter(name))] == pytest.approx(expected, rel=1e-12)


def test_without_decay_the_body_has_one_rate() -> None:
    flat = phase(body_rate=0.25)
    assert [stage_rate(flat, index, 3) for index in range(4)] == [0.25, 0.25, 0.25, 1.0]


def test_the_factor_scales_every_group(resnet: tuple[nn.Module, DepthAxis]) -> None:
    optimiser = build_optimiser(*resnet, phase(layer_decay=0.9), Optimiser())
    set_rate(optimiser, 0.5)
    set_rate(optimiser, 0.2)
    for group in optimiser.param_groups:
        assert group["lr"] == group["peak_lr"] * 0.2


def torch_rates(build: Callable[[torch.optim.Optimizer], LRScheduler], num_steps: int) -> list[float]:
    """The rates of a scheduler whose peak is 1."""
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build(optimiser)
    rates = []
    for _ in range(num_steps):
        rates.append(float(optimiser.param_groups[0]["lr"]))
        optimiser.step()
        scheduler.step()
    return rates


def factors(schedule: Schedule, num_steps: int) -> list[float]:
    return [schedule_factor(schedule, step, num_steps) for step in range(num_steps)]


@pytest.mark.parametrize("final_factor", [0.0, 0.1])
def test_cosine_is_that_of_torch(final_factor: float) -> None:
    ours = factors(Schedule(final_factor=final_factor), 40)
    theirs = torch_rates(lambda one: CosineAnnealingLR(one, T_max=40, eta_min=final_factor), 40)
    assert ours == pytest.approx(theirs, rel=1e-9)


def test_steps_are_those_of_torch() -> None:
    schedule = Schedule(kind=ScheduleKind.STEP, milestones=(0.25, 0.5, 0.8), gamma=0.2)
    theirs = torch_rates(lambda one: MultiStepLR(one, milestones=[10, 20, 32], gamma=0.2), 40)
    assert factors(schedule, 40) == pytest.approx(theirs, rel=1e-12)


def test_milestones_in_epochs_are_refused_as_they_would_never_come() -> None:
    with pytest.raises(ConfigError, match=r"milestones\.0: Input should be less than 1"):
        load_config(Schedule, None, ["kind=step", "milestones=[30, 60]"])


def test_one_cycle_is_that_of_torch_in_the_middle_of_each_step() -> None:
    # A scheduler with two steps for each of ours and one more has a step in the middle of each of ours.
    num_steps = 50
    fine = 2 * num_steps + 1
    theirs = torch_rates(
        lambda one: OneCycleLR(
            one,
            max_lr=1.0,
            total_steps=fine,
            pct_start=(0.3 * 2 * num_steps + 1) / fine,
            div_factor=25,
            final_div_factor=400,
            cycle_momentum=False,
        ),
        fine - 1,
    )
    assert factors(Schedule(kind=ScheduleKind.ONE_CYCLE), num_steps) == pytest.approx(theirs[1::2], rel=1e-9)


def test_the_rate_rises_linearly_and_then_follows_the_schedule() -> None:
    for kind in (ScheduleKind.COSINE, ScheduleKind.CONSTANT):
        found = factors(Schedule(kind=kind, warmup=0.2), 20)
        assert found[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
        assert found[4:] == factors(Schedule(kind=kind), 16)
    stepped = factors(Schedule(kind=ScheduleKind.STEP, warmup=0.2, milestones=(0.5,)), 20)
    assert stepped[4:] == [1.0] * 6 + [0.1] * 10


@pytest.mark.parametrize("kind", ScheduleKind)
@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_short_phases_have_rates_above_zero_and_at_most_the_peak(kind: ScheduleKind, num_steps: int) -> None:
    assert all(0 < factor <= 1 for factor in factors(Schedule(kind=kind, warmup=0.3), num_steps))


def backward(network: nn.Module, seed: int) -> None:
    images_BCHW = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    nn.functional.cross_entropy(network(images_BCHW), torch.tensor([0, 1, 2, 3])).backward()


@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_saved_optimiser_takes_the_same_next_steps_to_the_bit(
    resnet: tuple[nn.Module, DepthAxis], name: str
) -> None:
    network, axis = resnet
    network.to(memory_format=torch.channels_last).train()
    settings = phase(learning_rate=1e-3, layer_decay=0.9)
    optimiser = build_optimiser(network, axis, settings, OPTIMISERS[name])
    for seed in range(3):
        backward(network, seed)
        optimiser.step()
        optimiser.zero_grad()
    saved = state_to_safetensors({"keep": torch.zeros(1), **optimiser_tensors(optimiser)})
    restored_network = copy.deepcopy(network)
    restored = build_optimiser(restored_network, axis, settings, OPTIMISERS[name])
    tensors = {key: value for key, value in read_state_dict(saved).items() if key != "keep"}
    load_optimiser_tensors(restored, tensors)
    for seed in (3, 4):
        for one, its_optimiser in ((network, optimiser), (restored_network, restored)):
            backward(one, seed)
            its_optimiser.step()
            its_optimiser.zero_grad()
    for key, tensor in network.state_dict().items():
        assert tensor.isfinite().all()
        assert torch.equal(restored_network.state_dict()[key], tensor), key


def test_the_state_of_other_parameters_is_refused(resnet: tuple[nn.Module, DepthAxis]) -> None:
    network, axis = resnet
    optimiser = build_optimiser(network, axis, phase(), Optimiser())
    backward(network, 0)
    optimiser.step()
    freeze(network, axis, 5)
    smaller = build_optimiser(network, axis, phase(5), Optimiser())
    with pytest.raises(DataError, match="belongs to other parameters"):
        load_optimiser_tensors(optimiser, {"0.momentum_buffer": torch.zeros(2, 2)})
    with pytest.raises(DataError, match="belongs to other parameters"):
        load_optimiser_tensors(smaller, optimiser_tensors(optimiser))
