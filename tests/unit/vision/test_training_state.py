from __future__ import annotations

import torch
from torch import nn

from convoy.vision.averaging import MovingAverage
from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.backbones import build_network
from convoy.vision.training_state import PackedTraining, is_finite, pack_training


def train(network: nn.Module, optimiser: torch.optim.Optimizer, kept: MovingAverage, seed: int) -> None:
    images_BCHW = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    optimiser.zero_grad()
    nn.functional.cross_entropy(network(images_BCHW), torch.tensor([0, 1, 2, 3])).backward()
    optimiser.step()
    kept.after_step(network)


def start(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, MovingAverage]:
    network = build_network(BackboneConfig(arch="cifar_resnet20", weights="random", seed=seed)).train()
    return network, torch.optim.AdamW(network.parameters(), lr=1e-3), MovingAverage(0.9)


def test_a_packed_training_goes_on_to_the_bit() -> None:
    first = start(0)
    train(*first, seed=0)
    data = pack_training(*first)
    # What was packed is a copy: it does not move with the training.
    train(*first, seed=1)
    second = start(1)
    packed = PackedTraining(data)
    packed.load_network(second[0])
    packed.load_optimiser(second[1])
    packed.load_keeper(second[2], [], torch.device("cpu"))
    train(*second, seed=1)
    assert pack_training(*second) == pack_training(*first)


def test_a_weight_or_a_statistic_that_is_no_number_is_found() -> None:
    network, _, _ = start(0)
    assert is_finite(network)
    network.bn1.running_var[3] = float("inf")  # type: ignore[index, union-attr]
    assert not is_finite(network)
    network, _, _ = start(0)
    with torch.no_grad():
        next(network.parameters()).view(-1)[0] = float("nan")
    assert not is_finite(network)
