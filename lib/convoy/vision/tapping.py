"""Taps: the features of a network at named depths, several in one pass."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from convoy.core.errors import ConfigError
from convoy.vision.stages import DepthAxis, TapSide, resolve_tap


class TappedNetwork(nn.Module):
    """A network that returns its features at some taps instead of its logits.

    The pass ends at the deepest tap; compiled, what lies behind it is dropped from the graph. The network
    itself stays as usable as before, and may be tapped more than once. For one thread: one pass at a time.
    """

    def __init__(self, network: nn.Module, axis: DepthAxis, taps: Sequence[str | int]) -> None:
        super().__init__()
        if not taps:
            raise ConfigError("no tap is named", where="taps", next_step="name one, such as 'pooled'")
        self.network = network
        self._stages = {str(tap): resolve_tap(axis, tap) for tap in taps}
        # None outside of a pass: then the hooks do nothing.
        self._taken: dict[str, Tensor] | None = None
        self._num_calls: dict[str, int] = {}
        for tap, stage in self._stages.items():
            module = network.get_submodule(stage.tap_point.module_name)
            if stage.tap_point.side is TapSide.INPUT:
                hook = functools.partial(self._take_input, tap)
                module.register_forward_pre_hook(hook, with_kwargs=True)
            else:
                module.register_forward_hook(functools.partial(self._take_output, tap))

    def forward(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """By tap, the float32 features_BD of normalised images; maps are averaged over their pixels."""
        taken: dict[str, Tensor] = {}
        self._taken = taken
        self._num_calls = dict.fromkeys(self._stages, 0)
        try:
            self.network(images_BCHW)
        except _AllTaken:
            pass
        finally:
            self._taken = None
        return {tap: taken[tap] for tap in self._stages}

    def _take_input(self, tap: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._take(tap, (args, kwargs))

    def _take_output(self, tap: str, module: nn.Module, args: Any, output: Any) -> None:
        self._take(tap, output)

    def _take(self, tap: str, activations: Any) -> None:
        if self._taken is None:
            return
        call_index = self._num_calls[tap]
        self._num_calls[tap] += 1
        if call_index != self._stages[tap].tap_point.call_index:
            return
        activation = next(leaf for leaf in tree_leaves(activations) if isinstance(leaf, Tensor))
        # At once, because a later layer may work in place.
        self._taken[tap] = _features(activation)
        if len(self._taken) == len(self._stages) and not torch.compiler.is_compiling():
            raise _AllTaken


class _AllTaken(Exception):
    """Every tap has its features, so the rest of the pass is not needed."""


def _features(activation: Tensor) -> Tensor:
    if activation.ndim == 4:
        return activation.mean(dim=(2, 3), dtype=torch.float32)
    return activation.float()
