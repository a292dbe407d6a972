from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import weight_norm

from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.backbones import build_network, depth_axis, native_px
from convoy.vision.folding import fold_batch_norms
from convoy.vision.tapping import TappedNetwork

SIDE_PX = 8


def with_used_statistics(network: nn.Module) -> nn.Module:
    """The network as if it had been trained: no BatchNorm in it leaves its input as it is."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for norm in batch_norms(network):
            norm.running_mean.normal_(0, 0.1, generator=generator)
            norm.running_var.uniform_(0.5, 2, generator=generator)
            norm.weight.uniform_(0.5, 1.5, generator=generator)
            norm.bias.normal_(0, 0.1, generator=generator)
    return network.eval()


def batch_norms(network: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]


def images(side_px: int) -> Tensor:
    return torch.randn(2, 3, side_px, side_px, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("arch", "num_left"),
    [
        ("torchvision:resnet18", 0),
        # Half of them stand before their convolutions.
        ("torchvision:densenet121", 62),
        ("torchvision:inception_v3", 0),
        # Theirs drop and activate as well.
        ("timm:mobilenetv3_small_100", 0),
        ("timm:resnetv2_50", 17),
        ("cifar_resnet20", 0),
    ],
)
@torch.no_grad()
def test_every_tap_of_a_folded_network_gives_what_it_gave(arch: str, num_left: int) -> None:
    config = BackboneConfig(arch=arch, weights="random")
    network = with_used_statistics(build_network(config))
    axis = depth_axis(config, network)
    tapped = TappedNetwork(network, axis, [stage.name for stage in axis])
    batch = images(native_px(config))
    before = tapped(batch)

    folded = with_used_statistics(build_network(config))
    fold_batch_norms(folded, input_px=native_px(config))
    after = TappedNetwork(folded, axis, [stage.name for stage in axis])(batch)

    assert len(batch_norms(folded)) == num_left < len(batch_norms(network))
    for name, features_BD in before.items():
        assert (after[name] - features_BD).abs().max() < 2e-5 * features_BD.abs().max(), name


class TwoReaders(nn.Sequential):
    """What the convolution gives is used beside its BatchNorm."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        maps_BCHW = self[0](images_BCHW)
        return self[2](self[1](maps_BCHW) + maps_BCHW)


class InPlace(nn.Sequential):
    """What the convolution gives is changed before its BatchNorm sees it."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self[2](self[1](self[0](images_BCHW).relu_()))


class Twice(nn.Sequential):
    """One BatchNorm behind two convolutions."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self[2](self[1](self[0](images_BCHW)) + self[1](self[3](images_BCHW)))


class Curious(nn.Sequential):
    """It looks into its BatchNorm."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self[2](self[1](self[0](images_BCHW)) * self[1].weight.mean())


def layers() -> list[nn.Module]:
    return [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, SIDE_PX - 2), nn.Conv2d(3, 4, 3)]


def without_statistics() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Conv2d(4, 2, 6))


def with_weight_norm() -> nn.Module:
    first, *others = layers()[:3]
    with pytest.warns(FutureWarning):
        return nn.Sequential(weight_norm(first), *others)


@pytest.mark.parametrize(
    "build",
    [
        lambda: TwoReaders(*layers()),
        lambda: InPlace(*layers()),
        lambda: Twice(*layers()),
        lambda: Curious(*layers()),
        without_statistics,
        with_weight_norm,
    ],
    ids=["read beside", "changed before", "called twice", "looked into", "no statistics", "weight norm"],
)
@torch.no_grad()
def test_a_batch_norm_that_cannot_be_folded_stays(build: Callable[[], nn.Module]) -> None:
    network = build().eval()
    before = network(images(SIDE_PX))
    fold_batch_norms(network, input_px=SIDE_PX)
    assert len(batch_norms(network)) == 1
    assert torch.equal(network(images(SIDE_PX)), before)
