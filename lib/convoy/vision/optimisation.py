"""Optimisers over a depth axis, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from convoy.core.errors import DataError
from convoy.vision.stages import DepthAxis
from convoy.vision.training_config import Optimiser, OptimiserKind, Phase, Schedule, ScheduleKind

# Smith and Topin 2018: the rate starts at 1/25 of its peak, which lies at 30 % of the phase, and ends at 1/10,000.
_ONE_CYCLE_START, _ONE_CYCLE_PEAK, _ONE_CYCLE_END = 1 / 25, 0.3, 1e-4
_WITH_KERNELS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def build_optimiser(
    network: nn.Module, axis: DepthAxis, phase: Phase, optimiser: Optimiser
) -> torch.optim.Optimizer:
    """An optimiser over the parameters that require a gradient, a group for each stage and kind of parameter.

    Each group keeps its highest rate under `peak_lr`, from which `set_rate` makes the rate of a step. Norms, biases
    and scales have no weight decay (He et al. 2019, arXiv:1812.01187, section 3.1).
    """
    parameters = dict(network.named_parameters())
    decaying = _decaying(network)
    groups = []
    for stage in axis:
        rate = phase.learning_rate * stage_rate(phase, stage.index, axis.num_reused)
        trainable = [name for name in stage.parameter_names if parameters[name].requires_grad]
        for decays, decay in ((True, optimiser.weight_decay), (False, 0.0)):
            members = [parameters[name] for name in trainable if (name in decaying) is decays]
            if members:
                groups.append({"params": members, "lr": rate, "peak_lr": rate, "weight_decay": decay})
    if optimiser.kind is OptimiserKind.ADAMW:
        return torch.optim.AdamW(groups, betas=optimiser.betas)
    return torch.optim.SGD(groups, momentum=optimiser.momentum, nesterov=optimiser.momentum > 0)


def _decaying(network: nn.Module) -> set[str]:
    """The parameters with weight decay: kernels and matrices, and no biases or scales of channels.

    A scale may have as many dimensions as the maps, but one alone above 1: ConvNeXt's `layer_scale` (C, 1, 1), the
    `gain` (C, 1, 1, 1) of a standardised convolution. So has the kernel of a layer with one output, which decays.
    """
    kernels = {
        f"{name}.weight" for name, module in network.named_modules() if isinstance(module, _WITH_KERNELS)
    }
    return {
        name
        for name, parameter in network.named_parameters()
        if name in kernels or sum(size > 1 for size in parameter.shape) > 1
    }


def stage_rate(phase: Phase, index: int, num_reused: int) -> float:
    """The rate of a stage as a share of that of new ones, with layer-wise decay (arXiv:1801.06146)."""
    if index >= num_reused:
        return 1.0
    return phase.body_rate * phase.layer_decay ** (num_reused - index)


def set_rate(optimiser: torch.optim.Optimizer, factor: float) -> None:
    """Give every group its rate for the next step."""
    for group in optimiser.param_groups:
        group["lr"] = group["peak_lr"] * factor


def schedule_factor(schedule: Schedule, step: int, num_steps: int) -> float:
    """The learning rate of step 0 … num_steps - 1 of a phase, as a share of its peak."""
    if schedule.kind is ScheduleKind.ONE_CYCLE:
        return _one_cycle((step + 0.5) / num_steps)
    warmup_steps = round(schedule.warmup * num_steps)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    position = (step - warmup_steps) / max(num_steps - warmup_steps, 1)
    if schedule.kind is ScheduleKind.COSINE:
        return _cosine(1.0, schedule.final_factor, position)
    if schedule.kind is ScheduleKind.STEP:
        return schedule.gamma ** sum(step >= milestone * num_steps for milestone in schedule.milestones)
    return 1.0


def _one_cycle(position: float) -> float:
    if position < _ONE_CYCLE_PEAK:
        return _cosine(_ONE_CYCLE_START, 1.0, position / _ONE_CYCLE_PEAK)
    return _cosine(1.0, _ONE_CYCLE_END, (position - _ONE_CYCLE_PEAK) / (1 - _ONE_CYCLE_PEAK))


def _cosine(first: float, last: float, position: float) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * position)) / 2


def optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as named tensors: `<parameter number>.<key>`, in the order of its groups."""
    state = optimiser.state_dict()["state"]
    return {
        f"{number}.{key}": torch.as_tensor(value)
        for number, values in state.items()
        for key, value in values.items()
        if value is not None
    }


def load_optimiser_tensors(optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimiser_tensors` gave for an optimiser over the same parameters."""
    own = optimiser.state_dict()
    shapes = [parameter.shape for group in optimiser.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        number, _, key = name.partition(".")
        # Torch would not look, and a version with other groups numbers them otherwise.
        if int(number) >= len(shapes) or (tensor.ndim and tensor.shape != shapes[int(number)]):
            raise DataError(
                "the optimiser's state belongs to other parameters",
                where=name,
                next_step="train with --new-run",
            )
        state.setdefault(int(number), {})[key] = tensor
    optimiser.load_state_dict({"state": state, "param_groups": own["param_groups"]})
