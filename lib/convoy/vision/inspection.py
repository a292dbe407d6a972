"""A network that can be looked into: logits of images, and the activations of its stages on the way, with gradients."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from convoy.core.errors import ConfigError
from convoy.vision.forward import best_device, place
from convoy.vision.presets import EvalPreset
from convoy.vision.readout import LogitsNetwork
from convoy.vision.stages import DepthAxis, Stage, TapSide, resolve_tap
from convoy.vision.tapping import TappedNetwork


class InspectedNetwork:
    """A classifier on a device, in float32 and evaluation mode; its parameters take no gradients, images do.

    Logits are those of the `readout` (a head, say) on the features of `tap`, or these themselves. `stages` can be
    looked at, by name. For one thread.
    """

    def __init__(
        self,
        network: nn.Module,
        axis: DepthAxis,
        preset: EvalPreset,
        *,
        tap: str,
        readout: nn.Module | None,
        stages: Sequence[str] = (),
    ) -> None:
        self.device = best_device()
        self.preset = preset
        self.tap = resolve_tap(axis, tap)
        self.stages = {name: resolve_tap(axis, name) for name in stages}
        self._network, self._axis = network, axis
        # Before any tap hooks in, which ends the pass: hooks of one place run in the order of their making.
        self._watch = _StageWatch(network, self.stages)
        self._model = place(LogitsNetwork(network, axis, tap=tap, readout=readout), self.device)
        self._model.requires_grad_(False)
        self._bodies: dict[str, TappedNetwork] = {}

    def see(self, images_BCHW: Tensor, stages: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The logits_BK of images in 0..1, and by stage the activation: maps_BCHW, or features_BD of vectors.

        A stage behind the tap is not on the way to these logits, and so not among the activations.
        """
        with self._watch.watching(stages) as activations:
            logits_BK: Tensor = self._model(self._normalised(images_BCHW))
        return logits_BK, activations

    def see_stage(self, images_BCHW: Tensor, stage: str) -> Tensor:
        """The activation of one stage alone, which may lie behind the tap; what follows it is not computed."""
        if stage not in self._bodies:
            self._bodies[stage] = TappedNetwork(self._network, self._axis, [stage])
        with self._watch.watching([stage]) as activations:
            self._bodies[stage](self._normalised(images_BCHW))
        return activations[stage]

    def pixels(self, images_BCHW: Tensor) -> Tensor:
        """uint8 images as floats in 0..1 on the device."""
        return images_BCHW.to(self.device).float().div(255)

    def _normalised(self, images_BCHW: Tensor) -> Tensor:
        shape_C11 = (3, 1, 1)
        mean_C11 = torch.tensor(self.preset.mean, device=self.device).view(shape_C11)
        std_C11 = torch.tensor(self.preset.std, device=self.device).view(shape_C11)
        normalised_BCHW: Tensor = ((images_BCHW - mean_C11) / std_C11).contiguous(
            memory_format=torch.channels_last
        )
        return normalised_BCHW


class _StageWatch:
    """Takes the activations of stages during a pass, and sends copies on: a later layer may work in place."""

    def __init__(self, network: nn.Module, stages: dict[str, Stage]) -> None:
        self._stages = stages
        self._wanted: frozenset[str] = frozenset()
        self._num_calls: dict[str, int] = {}
        self._taken: dict[str, Tensor] = {}
        for name, stage in stages.items():
            module = network.get_submodule(stage.tap_point.module_name)
            if stage.tap_point.side is TapSide.INPUT:
                module.register_forward_pre_hook(functools.partial(self._take_input, name), with_kwargs=True)
            else:
                module.register_forward_hook(functools.partial(self._take_output, name))

    @contextmanager
    def watching(self, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        """What the stages give during the block, by name; filled while the block runs."""
        unknown = sorted(set(names) - self._stages.keys())
        if unknown:
            raise ConfigError(
                f"the stage '{unknown[0]}' is not watched",
                where="stages",
                next_step="name it when the network is opened",
            )
        taken: dict[str, Tensor] = {}
        self._wanted, self._taken = frozenset(names), taken
        self._num_calls = dict.fromkeys(names, 0)
        try:
            yield taken
        finally:
            self._wanted = frozenset()

    def _take_input(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        return self._take(name, (args, kwargs))

    def _take_output(self, name: str, module: nn.Module, args: Any, output: Any) -> Any:
        return self._take(name, output)

    def _take(self, name: str, activations: Any) -> Any:
        """The activations with a copy of the first tensor in its place, or None where they are not wanted."""
        if name not in self._wanted:
            return None
        call_index = self._num_calls[name]
        self._num_calls[name] += 1
        if call_index != self._stages[name].tap_point.call_index:
            return None
        leaves, form = tree_flatten(activations)
        place_ = next(index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
        self._taken[name] = leaves[place_]
        leaves[place_] = leaves[place_].clone()
        return tree_unflatten(leaves, form)
