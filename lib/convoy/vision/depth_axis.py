"""One depth axis for every ConvNet, found by a rule and not by a table of names.

The network runs once without computing anything, while module calls and the flow of activations are recorded.

1. A class of modules is a *block* if, where one of its children returns, more than one activation is still
   needed: a skip, a branch, a gate. Blocks stay whole, and so do layers and what has parameters of its own.
   Everything else is opened: the root, nn.Sequential, chains like Conv-BatchNorm-ReLU.
2. What remains are units in the order of execution. A unit that brings a weight (a parameter with two or more
   dimensions) begins a stage; norms, activations and pools join the stage before them.
3. The last stage is `logits`. Between the last spatial stage and the first layer after it lies `pooled`. A network
   without classifier ends in `pooled`, which is what it returns itself; layers behind its maps belong to that.

So between two stages one activation carries everything (only a root may do otherwise: NASNet's cells each read
two), and stages[:k] hold exactly the parameters that are frozen at freeze depth k.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

from convoy.core.errors import ConfigError
from convoy.vision.call_trace import Call, CallTrace, record_calls, run_on_shapes
from convoy.vision.stages import POOLED, DepthAxis, Stage, StageKind, TapPoint, TapSide


def derive_depth_axis(network: nn.Module, *, input_px: int, num_classes: int | None = None) -> DepthAxis:
    """The depth axis of a ConvNet in eval mode. Takes milliseconds, computes and changes nothing.

    `input_px` is the native input size of the architecture, not that of a job: so the axis belongs to the
    architecture. `num_classes`, where it is known, tells whether the network has a classifier (0: none), a convolution
    perhaps. Raises ConfigError for a network that is no ConvNet or cannot take such an input.
    """
    trace = record_calls(network, input_px=input_px)
    blocks = {type(call.module) for call in trace.calls if trace.is_block(call)} - {nn.Sequential}
    drafts = _drafts(list(_opened(trace.calls[0], blocks)), trace, num_classes)
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    names = _parameters_by_stage([draft.start for draft in drafts], trace.first_reads)
    return DepthAxis(
        stages=tuple(
            _stage(index, draft, {name: size for name, size in sizes.items() if name in names[index]})
            for index, draft in enumerate(drafts)
        ),
        off_axis=tuple(name for name in sizes if name not in trace.first_reads),
        num_reused=len(drafts) - (drafts[-1].name != POOLED),
    )


def count_macs(network: nn.Module, input_px: int) -> int:
    """Multiply-accumulates of one image through the network, over its convolutions and matrix products."""
    with FlopCounterMode(display=False) as counter:
        run_on_shapes(network, num_images=1, input_px=input_px)
    return int(counter.get_total_flops()) // 2


def count_tap_macs(network: nn.Module, axis: DepthAxis, input_px: int) -> tuple[int, ...]:
    """For each stage the multiply-accumulates of one image from the input to its tap point, where such a pass ends."""
    counted = [0] * len(axis)
    with FlopCounterMode(display=False) as counter, ExitStack() as hooks:
        for stage in axis:
            hooks.enter_context(_counting(network, stage, counter, counted))
        run_on_shapes(network, num_images=1, input_px=input_px)
    return tuple(counted)


def _counting(
    network: nn.Module, stage: Stage, counter: FlopCounterMode, counted: list[int]
) -> RemovableHandle:
    """A hook that notes by stage what was counted when its tap point is reached."""
    tap_point = stage.tap_point
    module, calls = network.get_submodule(tap_point.module_name), itertools.count()

    def note(*_: Any) -> None:
        if next(calls) == tap_point.call_index:
            counted[stage.index] = int(counter.get_total_flops()) // 2

    is_input = tap_point.side is TapSide.INPUT
    return module.register_forward_pre_hook(note) if is_input else module.register_forward_hook(note)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draft:
    """A stage before it has a number and parameters. `activation` is what lies at its tap point."""

    name: str
    start: int
    units: Sequence[Call]
    tap_point: TapPoint
    activation: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class _Following:
    """What a stage hands on, where it can be tapped, and the time by which it is there."""

    tap_point: TapPoint
    activation: Tensor
    time: int


def _opened(call: Call, blocks: set[type[nn.Module]]) -> Iterator[Call]:
    """The units of a call, in order: its children, opened where they are neither blocks nor layers."""
    for child in call.children:
        own_parameters = next(child.module.parameters(recurse=False), None)
        if child.children and own_parameters is None and type(child.module) not in blocks:
            yield from _opened(child, blocks)
        else:
            yield child


def _drafts(units: Sequence[Call], trace: CallTrace, num_classes: int | None) -> list[_Draft]:
    groups, root = _grouped(units), trace.calls[0]
    has_classifier = _is_classifier(groups[-1], root, num_classes)
    body = groups[:-1] if has_classifier else groups
    deepest = max((i for i, group in enumerate(body) if any(map(_gives_maps, group))), default=None)
    if deepest is None:
        raise ConfigError(
            "the network has no depth axis: no module with weights gives maps before its last one",
            where=type(root.module).__name__,
            next_step="choose a ConvNet, and give each layer with weights a module of its own",
        )
    behind = _given_to(groups[deepest + 1]) if deepest + 1 < len(groups) else _returned_by(root)
    if trace.has_clipped_kernel(behind.time, root.end):
        raise ConfigError(
            f"images of {trace.input_px} px are too small: their maps shrink to one pixel on the way",
            where=type(root.module).__name__,
            next_step="derive the axis at the native size of the architecture",
        )
    if not has_classifier:
        # Layers behind the maps make of them what the network returns, as MobileNetV3's last one does.
        groups[deepest:] = [[unit for group in groups[deepest:] for unit in group]]
        behind = _returned_by(root)
    maps, vectors = _split_after_maps(groups[deepest])
    runs = [*groups[:deepest], maps, *([vectors] if vectors else []), *groups[deepest + 1 :]]
    followings = [*map(_given_to, runs[1:]), *([] if has_classifier else [_returned_by(root)])]
    drafts = [_body_draft(run, following, trace) for run, following in zip(runs, followings, strict=False)]
    drafts[deepest + 1 : deepest + 1 + bool(vectors)] = [_pooled_draft(vectors, behind, drafts[deepest])]
    return [*drafts, _logits_draft(runs[-1], root)] if has_classifier else drafts


def _is_classifier(group: Sequence[Call], root: Call, num_classes: int | None) -> bool:
    """Whether the last weights are those of a classifier, and not of the last maps before a pooling.

    Of 0 classes there is none. Where they give maps, as SqueezeNet's do, it is a single layer that gives a map for
    each class.
    """
    if num_classes == 0:
        return False
    last = next((unit for unit in group if unit.brings_weight), group[-1])
    if not _gives_maps(last):
        return True
    if num_classes is not None:
        return root.output.shape[1:2] == (num_classes,)
    with_parameters = [unit for unit in group if next(unit.module.parameters(), None) is not None]
    return _is_vector(root.output) and with_parameters == [last] and not last.children


def _grouped(units: Iterable[Call]) -> list[list[Call]]:
    """Units in groups, each with one weight; what comes before the first weight joins its group."""
    groups: list[list[Call]] = [[]]
    for unit in units:
        if unit.brings_weight and any(earlier.brings_weight for earlier in groups[-1]):
            groups.append([])
        groups[-1].append(unit)
    return groups


def _split_after_maps(group: Sequence[Call]) -> tuple[Sequence[Call], Sequence[Call]]:
    """The units up to the last that gives maps, and those after it: global pooling, flattening, dropout."""
    end = 1 + max(i for i, unit in enumerate(group) if _gives_maps(unit))
    return group[:end], group[end:]


def _given_to(units: Sequence[Call]) -> _Following:
    """What the first of some units is given."""
    first = units[0]
    tap_point = TapPoint(module_name=first.name, side=TapSide.INPUT, call_index=first.index)
    return _Following(tap_point=tap_point, activation=first.input, time=first.start)


def _returned_by(root: Call) -> _Following:
    """What the network returns."""
    tap_point = TapPoint(module_name=root.name, side=TapSide.OUTPUT)
    return _Following(tap_point=tap_point, activation=root.output, time=root.end)


def _body_draft(units: Sequence[Call], following: _Following, trace: CallTrace) -> _Draft:
    """A stage inside the network. Its activation is what the next unit is given, after functions in between.

    Unless those functions pool the maps away, or the next unit goes on from elsewhere.
    """
    first, last = units[0], units[-1]
    name = next((unit.name for unit in units if unit.brings_weight), first.name)
    tap_point, activation = following.tap_point, following.activation
    continues = trace.returned_between(activation, first.start, following.time)
    if not (continues and _is_map(activation) == _is_map(last.output)):
        tap_point = TapPoint(module_name=last.name, side=TapSide.OUTPUT, call_index=last.index)
        activation = last.output
    return _Draft(name=name, start=first.start, units=units, tap_point=tap_point, activation=activation)


def _pooled_draft(units: Sequence[Call], following: _Following, deepest: _Draft) -> _Draft:
    """The vector that the first layer after the maps is given, or that is returned; or else the maps, to be averaged.

    A vector as long as the maps together is not pooled but flattened, as in AlexNet and VGG.
    """
    start = units[0].start if units else deepest.units[-1].end
    is_pooled = _is_vector(following.activation) and _length(following.activation) != _length(
        deepest.activation
    )
    tapped = following if is_pooled else deepest
    return _Draft(
        name=POOLED, start=start, units=units, tap_point=tapped.tap_point, activation=tapped.activation
    )


def _logits_draft(units: Sequence[Call], root: Call) -> _Draft:
    tap_point = TapPoint(module_name="", side=TapSide.OUTPUT)
    return _Draft(
        name=units[0].name, start=units[0].start, units=units, tap_point=tap_point, activation=root.output
    )


def _parameters_by_stage(starts: Sequence[int], first_reads: dict[str, int]) -> list[set[str]]:
    """The parameters that are first read in each stage; what is read before the first one belongs to it."""
    names: list[set[str]] = [set() for _ in starts]
    for name, time in first_reads.items():
        names[max(0, bisect.bisect(starts, time) - 1)].add(name)
    return names


def _stage(index: int, draft: _Draft, parameter_sizes: dict[str, int]) -> Stage:
    activation = draft.activation
    if not (_is_map(activation) or _is_vector(activation)):
        raise ConfigError(
            f"the network is no ConvNet: '{draft.name}' gives the shape {tuple(activation.shape)}",
            where=draft.name,
            next_step="choose a network that works on maps (batch, channel, height, width)",
        )
    is_map = _is_map(activation) and draft.name != POOLED
    return Stage(
        index=index,
        name=draft.name,
        kind=StageKind.SPATIAL if is_map else StageKind.VECTOR,
        channels=activation.shape[1],
        resolution_px=activation.shape[-1] if is_map else 1,
        module_names=tuple(dict.fromkeys(unit.name for unit in draft.units)),
        parameter_names=tuple(parameter_sizes),
        num_parameters=sum(parameter_sizes.values()),
        tap_point=draft.tap_point,
    )


def _gives_maps(unit: Call) -> bool:
    return _is_map(unit.output)


def _is_map(activation: Tensor) -> bool:
    """Whether this is BCHW of more than one pixel; square like the images, and so not BHWC."""
    return activation.ndim == 4 and activation.shape[-1] == activation.shape[-2] > 1


def _is_vector(activation: Tensor) -> bool:
    return activation.ndim == 2 or (activation.ndim == 4 and activation.shape[-2:].numel() == 1)


def _length(activation: Tensor) -> int:
    return math.prod(activation.shape[1:])
