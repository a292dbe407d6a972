"""One depth axis for every ConvNet, found by a rule and not by a table of names.

The network runs once without computing anything, while module calls and the flow of activations are recorded.

1. A class of modules is a *block* if, where one of its children returns, more than one activation is still
   needed: a skip, a branch, a gate. Blocks stay whole, and so do layers and what has parameters of its own.
   Everything else is opened: the root, nn.Sequential, chains like Conv-BatchNorm-ReLU.
2. What remains are units in the order of execution. A unit that brings a weight (a parameter with two or more
   dimensions) begins a stage; norms, activations and pools join the stage before them.
3. The last stage is `logits`. Between the last spatial stage and the first layer after it lies `pooled`.

So between two stages one activation carries everything (only a root may do otherwise: NASNet's cells each read
two), and stages[:k] hold exactly the parameters that are frozen at freeze depth k.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from convoy.core.errors import ConfigError
from convoy.vision.call_trace import Call, CallTrace, record_calls, run_on_shapes
from convoy.vision.stages import POOLED, DepthAxis, Stage, StageKind, TapPoint, TapSide


def derive_depth_axis(network: nn.Module, *, input_px: int) -> DepthAxis:
    """The depth axis of an image classifier in eval mode. Takes milliseconds, computes and changes nothing.

    `input_px` is the native input size of the architecture, not that of a job: so the axis belongs to the
    architecture. Raises ConfigError for a network that is no ConvNet classifier or cannot take such an input.
    """
    trace = record_calls(network, input_px=input_px)
    blocks = {type(call.module) for call in trace.calls if trace.is_block(call)} - {nn.Sequential}
    drafts = _drafts(list(_opened(trace.calls[0], blocks)), trace)
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    names = _parameters_by_stage([draft.start for draft in drafts], trace.first_reads)
    return DepthAxis(
        stages=tuple(
            _stage(index, draft, {name: size for name, size in sizes.items() if name in names[index]})
            for index, draft in enumerate(drafts)
        ),
        off_axis=tuple(name for name in sizes if name not in trace.first_reads),
        num_reused=len(drafts) - 1,
    )


def count_macs(network: nn.Module, input_px: int) -> int:
    """Multiply-accumulates of one image through the network, over its convolutions and matrix products."""
    with FlopCounterMode(display=False) as counter:
        run_on_shapes(network, num_images=1, input_px=input_px)
    return int(counter.get_total_flops()) // 2


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draft:
    """A stage before it has a number and parameters. `activation` is what lies at its tap point."""

    name: str
    start: int
    units: Sequence[Call]
    tap_point: TapPoint
    activation: Tensor


def _opened(call: Call, blocks: set[type[nn.Module]]) -> Iterator[Call]:
    """The units of a call, in order: its children, opened where they are neither blocks nor layers."""
    for child in call.children:
        own_parameters = next(child.module.parameters(recurse=False), None)
        if child.children and own_parameters is None and type(child.module) not in blocks:
            yield from _opened(child, blocks)
        else:
            yield child


def _drafts(units: Sequence[Call], trace: CallTrace) -> list[_Draft]:
    groups = _grouped(units)
    deepest = max((i for i, group in enumerate(groups[:-1]) if any(map(_gives_maps, group))), default=None)
    if deepest is None:
        raise ConfigError(
            "the network has no depth axis: no module with weights gives maps before its last one",
            where=type(trace.calls[0].module).__name__,
            next_step="choose a ConvNet, and give each layer with weights a module of its own",
        )
    if trace.has_clipped_kernel(groups[deepest + 1][0].start, trace.calls[0].end):
        raise ConfigError(
            f"images of {trace.input_px} px are too small: their maps shrink to one pixel on the way",
            where=type(trace.calls[0].module).__name__,
            next_step="derive the axis at the native size of the architecture",
        )
    maps, vectors = _split_after_maps(groups[deepest])
    runs = [*groups[:deepest], maps, *([vectors] if vectors else []), *groups[deepest + 1 :]]
    drafts = [_body_draft(run, following[0], trace) for run, following in itertools.pairwise(runs)]
    pooled = _pooled_draft(vectors, groups[deepest + 1][0], drafts[deepest])
    drafts[deepest + 1 : deepest + 1 + bool(vectors)] = [pooled]
    return [*drafts, _logits_draft(runs[-1], trace.calls[0])]


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


def _body_draft(units: Sequence[Call], following: Call, trace: CallTrace) -> _Draft:
    """A stage inside the network. Its activation is what the next unit is given, after functions in between.

    Unless those functions pool the maps away, or the next unit goes on from elsewhere.
    """
    first, last = units[0], units[-1]
    name = next((unit.name for unit in units if unit.brings_weight), first.name)
    continues = trace.returned_between(following.input, first.start, following.start)
    if continues and _is_map(following.input) == _is_map(last.output):
        tap_point = TapPoint(module_name=following.name, side=TapSide.INPUT, call_index=following.index)
        activation = following.input
    else:
        tap_point = TapPoint(module_name=last.name, side=TapSide.OUTPUT, call_index=last.index)
        activation = last.output
    return _Draft(name=name, start=first.start, units=units, tap_point=tap_point, activation=activation)


def _pooled_draft(units: Sequence[Call], following: Call, deepest: _Draft) -> _Draft:
    """The vector that the first layer after the maps is given; or else the maps, to be averaged.

    A vector as long as the maps together is not pooled but flattened, as in AlexNet and VGG.
    """
    start = units[0].start if units else deepest.units[-1].end
    if _is_vector(following.input) and _length(following.input) != _length(deepest.activation):
        tap_point = TapPoint(module_name=following.name, side=TapSide.INPUT, call_index=following.index)
        activation = following.input
    else:
        tap_point, activation = deepest.tap_point, deepest.activation
    return _Draft(name=POOLED, start=start, units=units, tap_point=tap_point, activation=activation)


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
