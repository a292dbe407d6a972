"""Two small classics that no library ships: LeNet-5 and the CIFAR-10 ResNets."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (the field's name for it)
from torch import Tensor, nn

from convoy.core.errors import ConfigError

CIFAR_RESNET_DEPTHS = (20, 32, 44, 56, 110)


class LeNet5(nn.Module):
    """LeNet-5 for 32x32 images (LeCun et al. 1998, section II.B and appendix A).

    Takes images_BCHW of 3x32x32, gives logits_BD. It differs from the paper in what became custom: three input
    channels, every map of S2 feeds every map of C3, and the output is linear, not radial basis functions.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(3, 6, kernel_size=5)
        self.s2 = Subsampling(6)
        self.c3 = nn.Conv2d(6, 16, kernel_size=5)
        self.s4 = Subsampling(16)
        self.c5 = nn.Conv2d(16, 120, kernel_size=5)
        self.f6 = nn.Linear(120, 84)
        self.output = nn.Linear(84, num_classes)
        self._initialise()

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """The logits_BD of normalised images."""
        maps = _squash(self.s2(_squash(self.c1(images_BCHW))))
        maps = _squash(self.s4(_squash(self.c3(maps))))
        vectors = torch.flatten(_squash(self.c5(maps)), 1)
        logits: Tensor = self.output(_squash(self.f6(vectors)))
        return logits

    def _initialise(self) -> None:
        """Normal with deviation fan-in^-1/2 (LeCun et al. 1998, "Efficient BackProp", equation 16).

        The paper's own +-2.4 / fan-in needs its second-order steps: gradient descent stays where it starts.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear | Subsampling):
                # A subsampling unit reads four pixels with one weight.
                fan_in = 4 if isinstance(module, Subsampling) else module.weight[0].numel()
                nn.init.normal_(module.weight, std=fan_in**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


class Subsampling(nn.Module):
    """The S layers of LeNet-5: the sum of 2x2 pixels, times one coefficient a channel, plus one bias."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        """Maps of half the height and width."""
        sums = 4 * F.avg_pool2d(maps_BCHW, kernel_size=2)
        return sums * self.weight[:, None, None] + self.bias[:, None, None]


def _squash(values: Tensor) -> Tensor:
    """The paper's tanh, with f(1) = 1 and f(-1) = -1 (appendix A)."""
    return 1.7159 * torch.tanh(values * (2 / 3))


class CifarResNet(nn.Module):
    """The thin ResNets for 32x32 images (He et al. 2015, arXiv:1512.03385, section 4.2), depth 6n + 2.

    Takes images_BCHW of 3x32x32 (or any size), gives logits_BD. Parameters are named as in the widely used
    state dicts of akamaster/pytorch_resnet_cifar10.
    """

    def __init__(self, depth: int, num_classes: int = 10) -> None:
        super().__init__()
        blocks_per_stage, remainder = divmod(depth - 2, 6)
        if blocks_per_stage < 1 or remainder:
            raise ConfigError(
                f"a CIFAR ResNet has a depth of 6n + 2, not {depth}",
                where="depth",
                next_step=f"choose one of {', '.join(map(str, CIFAR_RESNET_DEPTHS))}",
            )
        self.conv1 = nn.Conv2d(3, 16, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = _residual_stage(16, 16, blocks_per_stage)
        self.layer2 = _residual_stage(16, 32, blocks_per_stage)
        self.layer3 = _residual_stage(32, 64, blocks_per_stage)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64, num_classes)
        self._initialise()

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """The logits_BD of normalised images."""
        maps = self.relu(self.bn1(self.conv1(images_BCHW)))
        maps = self.layer3(self.layer2(self.layer1(maps)))
        logits: Tensor = self.linear(torch.flatten(self.avgpool(maps), 1))
        return logits

    def _initialise(self) -> None:
        """Normal with variance 2 / fan-in (He et al. 2015, arXiv:1502.01852, equation 10)."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(self.linear.bias)


def _residual_stage(in_channels: int, out_channels: int, num_blocks: int) -> nn.Sequential:
    """Blocks of one width; where the width doubles, the first one halves the resolution."""
    first = ResidualBlock(in_channels, out_channels, stride=out_channels // in_channels)
    return nn.Sequential(first, *(ResidualBlock(out_channels, out_channels) for _ in range(num_blocks - 1)))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut without parameters (option A of section 3.3)."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()
        self._stride = stride
        self._new_channels = out_channels - in_channels

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        """The block's maps, after the last ReLU."""
        residual = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(maps_BCHW)))))
        activated: Tensor = self.relu(residual + self._shortcut(maps_BCHW))
        return activated

    def _shortcut(self, maps_BCHW: Tensor) -> Tensor:
        """Every stride-th pixel, with zero channels added half in front and half behind."""
        if self._new_channels == 0:
            return maps_BCHW
        half = self._new_channels // 2
        return F.pad(maps_BCHW[:, :, :: self._stride, :: self._stride], (0, 0, 0, 0, half, half))
