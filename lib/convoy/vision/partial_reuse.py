"""Partial reuse: the early stages of a network, new convolutions behind them, and a new MLP head."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from convoy.core.errors import ConfigError
from convoy.vision.backbone_config import NewLayers
from convoy.vision.stages import POOLED, DepthAxis, Stage, StageKind, TapPoint, TapSide, resolve_tap

_BODY = "body"


class PartialReuseNetwork(nn.Module):
    """The stages of `body` up to `layers.after`, then `convs`, global average pooling and `mlp`.

    What lies behind the last reused stage is dropped from the body, so it costs no memory, no time and no bytes
    in a bundle. `axis` goes on with one stage for each new layer that has weights.
    """

    def __init__(self, body: nn.Module, axis: DepthAxis, layers: NewLayers, *, num_classes: int) -> None:
        super().__init__()
        last = _last_reused(axis, layers.after)
        self.body = body
        self._tap = last.tap_point
        self._is_running = False
        self._num_calls = 0
        self._maps: Tensor | None = None
        behind = {name for stage in axis.stages[last.index + 1 :] for name in stage.parameter_names}
        _drop(body, {*behind, *axis.off_axis}, watched=last.tap_point.module_name)
        self._watch(body.get_submodule(last.tap_point.module_name))
        self.convs = nn.Sequential(*_conv_blocks(last.channels, layers))
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.mlp = nn.Sequential(*_mlp(_width(layers, last), layers, num_classes))
        self.axis = DepthAxis(
            stages=tuple(self._stages(axis, last, layers)), off_axis=(), num_reused=last.index + 1
        )

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """The logits_BK of normalised images."""
        self._is_running, self._num_calls, self._maps = True, 0, None
        try:
            self.body(images_BCHW)
        except _ReachedLastStage:
            pass
        finally:
            self._is_running = False
            maps, self._maps = self._maps, None
        if maps is None:
            raise RuntimeError("the body did not come to its last reused stage")
        logits: Tensor = self.mlp(self.pool(self.convs(maps)))
        return logits

    def load_body(self, state: Mapping[str, Tensor]) -> None:
        """Take the reused layers from a state dict of the whole network; ConfigError if it does not fit."""
        own = self.body.state_dict()
        misfits = [
            f"{name} is {tuple(state[name].shape) if name in state else 'missing'}, not {tuple(own[name].shape)}"
            for name in own
            if name not in state or state[name].shape != own[name].shape
        ]
        if misfits:
            raise ConfigError(
                f"the weights do not fit the reused stages: {'; '.join(misfits[:5])}",
                where=type(self.body).__name__,
                next_step="correct backbone.arch or backbone.weights",
            )
        self.body.load_state_dict({name: state[name] for name in own})

    def _watch(self, module: nn.Module) -> None:
        # Bound methods, because a deep copy of the network then watches itself and not the original.
        if self._tap.side is TapSide.INPUT:
            module.register_forward_pre_hook(self._take_input, with_kwargs=True)
        else:
            module.register_forward_hook(self._take_output)

    def _take_input(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._take((args, kwargs))

    def _take_output(self, module: nn.Module, args: Any, output: Any) -> None:
        self._take(output)

    def _take(self, activations: Any) -> None:
        if not self._is_running:
            return
        call_index, self._num_calls = self._num_calls, self._num_calls + 1
        if call_index == self._tap.call_index:
            self._maps = next(leaf for leaf in tree_leaves(activations) if isinstance(leaf, Tensor))
            if not torch.compiler.is_exporting():
                raise _ReachedLastStage
            # An exporter cannot follow the exception, and what is left of the body may change the maps in place.
            self._maps = self._maps.clone()

    def _stages(self, axis: DepthAxis, last: Stage, layers: NewLayers) -> Iterator[Stage]:
        for stage in axis.stages[: last.index]:
            yield _below_body(stage)
        # At its own tap point the pass leaves the body, before anyone else could look.
        maps = TapPoint(module_name="convs", side=TapSide.INPUT)
        yield dataclasses.replace(_below_body(last), tap_point=maps)
        index, resolution_px = last.index + 1, last.resolution_px
        for number, layer in enumerate(layers.convs):
            resolution_px = -(-resolution_px // layer.stride)
            name = f"convs.{number}"
            yield self._new_stage(index, name, (name,), layer.width, resolution_px)
            index += 1
        yield self._new_stage(index, POOLED, ("pool",), _width(layers, last))
        widths = {
            number: layer.out_features
            for number, layer in enumerate(self.mlp)
            if isinstance(layer, nn.Linear)
        }
        for number, following in itertools.pairwise([*widths, len(self.mlp)]):
            index += 1
            # As on every axis, ReLU and dropout belong to the layer before them.
            names = tuple(f"mlp.{member}" for member in range(number, following))
            yield self._new_stage(index, names[0], names, widths[number])

    def _new_stage(
        self, index: int, name: str, module_names: tuple[str, ...], channels: int, resolution_px: int = 1
    ) -> Stage:
        sizes = {
            parameter_name: parameter.numel()
            for module_name in module_names
            for parameter_name, parameter in self.get_submodule(module_name).named_parameters(module_name)
        }
        return Stage(
            index=index,
            name=name,
            kind=StageKind.SPATIAL if name.startswith("convs") else StageKind.VECTOR,
            channels=channels,
            resolution_px=resolution_px,
            module_names=module_names,
            parameter_names=tuple(sizes),
            num_parameters=sum(sizes.values()),
            tap_point=TapPoint(module_name=module_names[-1], side=TapSide.OUTPUT),
        )


class _ReachedLastStage(Exception):
    """The last reused stage has its maps, so the rest of the body is not needed."""


def _last_reused(axis: DepthAxis, after: str | int) -> Stage:
    stage = resolve_tap(axis, after, where="reuse.after")
    if stage.kind is not StageKind.SPATIAL:
        spatial = [one.name for one in axis if one.kind is StageKind.SPATIAL]
        raise ConfigError(
            f"new convolutions need maps, but '{stage.name}' gives vectors",
            where="reuse.after",
            next_step=f"choose one of {', '.join(spatial)}",
        )
    return stage


def _drop(body: nn.Module, parameter_names: set[str], *, watched: str) -> None:
    """Put an identity in place of every module all of whose parameters are among the names.

    The modules around the watched one stay, because its calls come through them.
    """
    for name, module in list(body.named_modules()):
        own = [f"{name}.{parameter}" for parameter, _ in module.named_parameters()]
        is_around = watched.startswith(f"{name}.")
        if name and own and not is_around and parameter_names.issuperset(own):
            parent, _, child = name.rpartition(".")
            # Its submodules are dropped with it; those that are visited later are no longer part of the body.
            if _is_part(body, name, module):
                setattr(body.get_submodule(parent), child, nn.Identity())


def _is_part(body: nn.Module, name: str, module: nn.Module) -> bool:
    try:
        return body.get_submodule(name) is module
    except AttributeError:
        return False


def _conv_blocks(in_channels: int, layers: NewLayers) -> Iterator[nn.Sequential]:
    for layer in layers.convs:
        conv = nn.Conv2d(
            in_channels,
            layer.width,
            layer.kernel_px,
            stride=layer.stride,
            padding=layer.kernel_px // 2,
            bias=False,
        )
        # He et al. 2015 (arXiv:1502.01852), equation 10.
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        yield nn.Sequential(conv, nn.BatchNorm2d(layer.width), nn.ReLU())
        in_channels = layer.width


def _mlp(in_features: int, layers: NewLayers, num_classes: int) -> Iterator[nn.Module]:
    for width in layers.hidden_widths:
        hidden = nn.Linear(in_features, width)
        nn.init.kaiming_normal_(hidden.weight, nonlinearity="relu")
        nn.init.zeros_(hidden.bias)
        yield from (hidden, nn.ReLU(), nn.Dropout(layers.dropout))
        in_features = width
    yield nn.Linear(in_features, num_classes)


def _width(layers: NewLayers, last: Stage) -> int:
    return layers.convs[-1].width if layers.convs else last.channels


def _below_body(stage: Stage) -> Stage:
    def inside(name: str) -> str:
        return f"{_BODY}.{name}"

    tap = dataclasses.replace(stage.tap_point, module_name=inside(stage.tap_point.module_name))
    return dataclasses.replace(
        stage,
        name=inside(stage.name),
        module_names=tuple(map(inside, stage.module_names)),
        parameter_names=tuple(map(inside, stage.parameter_names)),
        tap_point=tap,
    )
