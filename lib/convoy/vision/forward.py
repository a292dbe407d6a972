"""What every forward engine shares: the device, the normalised network, its compilation and its precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from convoy.vision.engine_options import Precision
from convoy.vision.presets import EvalPreset
from convoy.vision.views import normalise


class NormalisedNetwork(nn.Module):
    """Normalisation and network as one graph, so that a compiler fuses them: uint8 images_BCHW in."""

    def __init__(self, network: nn.Module, preset: EvalPreset) -> None:
        super().__init__()
        self._network = network
        self._preset = preset

    def forward(self, images_BCHW: Tensor) -> Any:
        """What the network makes of the normalised images."""
        return self._network(normalise(images_BCHW, self._preset))


def best_device() -> torch.device:
    """The current GPU, or else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def place(network: nn.Module, device: torch.device) -> nn.Module:
    """The network itself, in evaluation mode, on the device and in channels_last."""
    return network.eval().to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def compile_network(network: nn.Module, device: torch.device) -> nn.Module:
    """The network compiled for batches of one size; it is compiled when it first runs.

    On a CPU the weights become constants, so that batch norms fold into the convolutions.
    """
    freezing: dict[str, Any] = {"freezing": True} if device.type == "cpu" else {}
    return torch.compile(network, dynamic=False, options=freezing)  # type: ignore[return-value]


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The context in which a network computes in that precision."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision is Precision.BF16)


def new_images(shape: tuple[int, int, int, int], device: torch.device) -> Tensor:
    """A reusable uint8 buffer images_BCHW of zeros in channels_last, pinned where the device is a GPU."""
    buffer = torch.zeros(shape, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    return buffer.pin_memory() if device.type == "cuda" else buffer
