"""The stages of a network as values: what a depth axis is, and what a tap means on it. Free of torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from convoy.core.errors import ConfigError

POOLED = "pooled"


class StageKind(StrEnum):
    """What a stage gives: maps of more than one pixel, or one vector an image."""

    SPATIAL = "spatial"
    VECTOR = "vector"


class TapSide(StrEnum):
    """Whether an activation is what a module is given or what it returns."""

    INPUT = "input"
    OUTPUT = "output"


@dataclass(frozen=True, slots=True, kw_only=True)
class TapPoint:
    """Where an activation can be taken: the input or output of the `call_index`-th call of a module."""

    module_name: str
    side: TapSide
    call_index: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One step of the depth axis. Names are qualified names inside the network.

    `channels` and `resolution_px` (1 for vectors) describe the activation at `tap_point`, for an input of the
    size that the axis was built with.
    """

    index: int
    name: str
    kind: StageKind
    channels: int
    resolution_px: int
    module_names: tuple[str, ...]
    parameter_names: tuple[str, ...]
    num_parameters: int
    tap_point: TapPoint


@dataclass(frozen=True, slots=True, kw_only=True)
class DepthAxis:
    """The stages of a network, stem = 0 to logits; every parameter that runs in eval mode is in exactly one.

    Those of a network without classifier end with `pooled`.

    `off_axis` names the parameters that do not run in eval mode, such as those of auxiliary classifiers.
    `num_reused` leading stages keep what they have learnt when the network is put to another task; those behind them,
    the head or more, begin anew.
    """

    stages: tuple[Stage, ...]
    off_axis: tuple[str, ...]
    num_reused: int

    @property
    def num_classes(self) -> int:
        """How many logits the network gives: 0 without a classifier."""
        last = self.stages[-1]
        return 0 if last.name == POOLED else last.channels

    def __len__(self) -> int:
        return len(self.stages)

    def __iter__(self) -> Iterator[Stage]:
        return iter(self.stages)

    def __getitem__(self, index: int) -> Stage:
        return self.stages[index]


def resolve_tap(axis: DepthAxis, tap: str | int, *, where: str = "tap") -> Stage:
    """The stage that a tap means: an index, a stage's name, a module's name, or an alias.

    `stem`, `pooled` and `logits` are the same places in every network; a module that holds several stages,
    such as `layer2`, means its last one. Raises ConfigError with the nearest names, at `where`: the key that was set.
    """
    if isinstance(tap, int):
        if 0 <= tap < len(axis):
            return axis[tap]
        advice = f"choose an index from 0 to {len(axis) - 1}"
        raise ConfigError(f"the network has no stage {tap}", where=where, next_step=advice)
    named = {stage.name: stage for stage in axis} | {"stem": axis[0]}
    if axis.num_classes:
        named["logits"] = axis[len(axis) - 1]
    if tap in named:
        return named[tap]
    for stage in reversed(axis.stages):
        if any(name == tap or name.startswith(f"{tap}.") for name in stage.module_names):
            return stage
    raise ConfigError(
        f"the network has no stage '{tap}'", where=where, next_step=_advice(axis, tap, list(named))
    )


def _advice(axis: DepthAxis, tap: str, known: Sequence[str]) -> str:
    if tap == "logits":
        return f"it has no classifier; what it returns is '{POOLED}'"
    for stage in axis:
        if any(tap.startswith(f"{name}.") for name in stage.module_names):
            return f"what lies inside a block cannot be tapped; the block itself is '{stage.name}'"
    return f"choose one of {', '.join(difflib.get_close_matches(tap, known, cutoff=0.4) or known)}"
