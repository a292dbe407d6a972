"""The tensors of a training as one safetensors file, for checkpoints."""

from __future__ import annotations

import torch
from torch import nn

from convoy.vision.averaging import WeightKeeper
from convoy.vision.optimisation import load_optimiser_tensors, optimiser_tensors
from convoy.vision.weights import read_state_dict, state_below, state_to_safetensors

_NETWORK, _OPTIMISER, _KEEPER = "network.", "optimiser.", "keeper."


def pack_training(network: nn.Module, optimiser: torch.optim.Optimizer, keeper: WeightKeeper) -> bytes:
    """A copy of weights, buffers, optimiser state and kept weights, as they are now."""
    parts = {
        _NETWORK: network.state_dict(),
        _OPTIMISER: optimiser_tensors(optimiser),
        _KEEPER: keeper.tensors(),
    }
    return state_to_safetensors(
        {prefix + name: tensor for prefix, tensors in parts.items() for name, tensor in tensors.items()}
    )


class PackedTraining:
    """What `pack_training` packed, to be put back in parts."""

    def __init__(self, data: bytes) -> None:
        self._tensors = read_state_dict(data)

    def load_network(self, network: nn.Module) -> None:
        """Put weights and buffers back."""
        network.load_state_dict(state_below(self._tensors, _NETWORK))

    def load_optimiser(self, optimiser: torch.optim.Optimizer) -> None:
        """Put the state of an optimiser over the same parameters back."""
        load_optimiser_tensors(optimiser, state_below(self._tensors, _OPTIMISER))

    def load_keeper(self, keeper: WeightKeeper, scores: list[float], device: torch.device) -> None:
        """Put the kept weights back, onto the network's device."""
        tensors = {name: tensor.to(device) for name, tensor in state_below(self._tensors, _KEEPER).items()}
        keeper.load(tensors, scores)


def is_finite(network: nn.Module) -> bool:
    """Whether all weights and buffers are finite numbers."""
    tensors = [tensor for tensor in network.state_dict().values() if tensor.is_floating_point()]
    return bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())
