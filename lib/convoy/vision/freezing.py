"""Freezing a network up to a depth, and the default depth for a number of images."""

from __future__ import annotations

import math
from contextlib import suppress
from itertools import takewhile

from torch import nn

from convoy.core.errors import ConfigError
from convoy.vision.stages import DepthAxis, Stage, resolve_tap
from convoy.vision.training_config import AUTO, BODY, Phase

# Up to the first number of images a class only the head is trained, from the second on everything is.
_FREEZE_ALL_UP_TO = 20
_FREEZE_NOTHING_FROM = 1000
BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def resolve_freeze_depth(
    axis: DepthAxis, wanted: int | str, *, images_per_class: float, num_learnt: int | None = None
) -> int:
    """The number of leading stages that stay frozen, 0 to len(axis) - 1.

    `wanted` is that number, the name of the last frozen stage, "body" (all that is reused: all but the head, or but the
    new layers), or "auto". `num_learnt` leading stages have weights that were learnt; without it all have that may be
    frozen. Raises ConfigError for a depth that the network does not have, that leaves nothing to train, or that would
    keep random weights.
    """
    most = len(axis) - 1
    learnt = most if num_learnt is None else num_learnt
    if wanted == AUTO:
        return min(_automatic_depth(axis, images_per_class), learnt)
    depth = _wanted_depth(axis, wanted)
    if not 0 <= depth <= most:
        raise ConfigError(
            f"a freeze depth of {wanted} is impossible: the network has {len(axis)} stages, and one must train",
            where="freeze_depth",
            next_step=f"choose 0 (nothing frozen) to {most} ({BODY}: only what is new trains), or {AUTO}",
        )
    if depth > learnt:
        raise ConfigError(
            f"a freeze depth of {wanted} would keep random weights: {learnt} of {len(axis)} stages have learnt ones",
            where="freeze_depth",
            next_step=f"freeze at most {learnt}, or only in a later phase, when the phases before have trained them",
        )
    return depth


def _automatic_depth(axis: DepthAxis, images_per_class: float) -> int:
    """That depth on an axis: stages without weights, such as a pooling, train nothing and do not count."""
    with_weights = [stage.index for stage in axis.stages[: axis.num_reused] if stage.parameter_names]
    num_frozen = automatic_freeze_depth(len(with_weights), images_per_class)
    if num_frozen == len(with_weights):
        return axis.num_reused
    return with_weights[num_frozen - 1] + 1 if num_frozen else 0


def _wanted_depth(axis: DepthAxis, wanted: int | str) -> int:
    if wanted == BODY:
        return axis.num_reused
    return wanted if isinstance(wanted, int) else _last_frozen(axis, wanted).index + 1


def _last_frozen(axis: DepthAxis, name: str) -> Stage:
    try:
        return resolve_tap(axis, name, where="freeze_depth")
    except ConfigError:
        # Below new layers stages lie in `body`, and are asked for as in the network that they come from.
        with suppress(ConfigError):
            return resolve_tap(axis, f"{BODY}.{name}")
        raise


def frozen_stages(phase: Phase) -> int:
    """The freeze depth of a phase in which it was resolved to a number; ConfigError if it was not."""
    if isinstance(phase.freeze_depth, int):
        return phase.freeze_depth
    raise ConfigError(f"the freeze depth '{phase.freeze_depth}' was not resolved", where=phase.name)


def automatic_freeze_depth(num_body_stages: int, images_per_class: float) -> int:
    """Frozen stages by the number of training images a class: all up to 20, none from 1000 on.

    In between the share falls with the logarithm of the number. The more images, the deeper a network may be
    fine-tuned before it overfits (Yosinski et al. 2014, arXiv:1411.1792; Kornblith et al. 2019,
    arXiv:1805.08974); the two ends are our rule of thumb, and a search over depths beats it.
    """
    bounded = min(max(images_per_class, _FREEZE_ALL_UP_TO), _FREEZE_NOTHING_FROM)
    share = math.log(_FREEZE_NOTHING_FROM / bounded) / math.log(_FREEZE_NOTHING_FROM / _FREEZE_ALL_UP_TO)
    return round(num_body_stages * share)


def freeze(network: nn.Module, axis: DepthAxis, freeze_depth: int) -> None:
    """Let the parameters behind the first `freeze_depth` stages train, and no others."""
    trainable = {name for stage in axis.stages[freeze_depth:] for name in stage.parameter_names}
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in trainable)


def trains_the_same(axis: DepthAxis, *freeze_depths: int) -> bool:
    """Whether all of these depths leave the same parameters to train: no stage between them has any."""
    between = axis.stages[min(freeze_depths) : max(freeze_depths)]
    return not any(stage.parameter_names for stage in between)


def trains_batchnorm(network: nn.Module, axis: DepthAxis, freeze_depth: int) -> bool:
    """Whether a BatchNorm lies behind the frozen stages: one that takes statistics of the images in a pass."""
    frozen = {
        module
        for stage in axis.stages[:freeze_depth]
        for name in stage.module_names
        for module in network.get_submodule(name).modules()
    }
    return any(isinstance(module, BATCHNORMS) and module not in frozen for module in network.modules())


def set_train_mode(network: nn.Module, axis: DepthAxis, freeze_depth: int) -> None:
    """Train mode behind the frozen stages; inside them eval mode, so that BatchNorm keeps its statistics.

    Dropout between the last frozen weight and the first that trains is that one's, though it lies in a frozen stage.
    """
    network.train()
    frozen = [
        network.get_submodule(name) for stage in axis.stages[:freeze_depth] for name in stage.module_names
    ]
    for module in frozen:
        module.eval()
    for module in takewhile(_has_no_parameters, reversed(frozen)):
        if isinstance(module, _DROPOUTS):
            module.train()


def _has_no_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is None
