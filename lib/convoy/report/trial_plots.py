"""Pictures of a search: what its trials chose and what that was worth, and how they learnt."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from convoy.core.fingerprints import canonical_json
from convoy.core.trial_events import TrialState
from convoy.pipelines.trial_journal import TrialRecord
from convoy.report.trial_table import describe_values, short_names, shown_value

_SIZE_INCHES, _DPI = (12, 8), 100
_MAX_LABELLED = 8
_GREY = "#bbbbbb"


def draw_parallel_coordinates(trials: Sequence[TrialRecord]) -> bytes:
    """A PNG of 1200x800: an axis for each key of the space and one for validation top-1, a line for each trial.

    Lines are coloured by top-1; trials without one are grey and end at the last key.
    """
    figure, canvas = _figure()
    axes = figure.subplots()
    keys = list(dict.fromkeys(key for trial in trials for key in trial.values))
    scales = [_Scale([trial.values.get(key) for trial in trials]) for key in keys]
    known = [trial.top1 for trial in trials if trial.top1 is not None]
    top1 = _Scale(known)
    colour = _colours(known)
    for trial in sorted(trials, key=lambda trial: -1.0 if trial.top1 is None else trial.top1):
        heights = [scale.height(trial.values.get(key)) for key, scale in zip(keys, scales, strict=True)]
        if trial.top1 is not None:
            heights.append(top1.height(trial.top1))
        line = {"color": _GREY if trial.top1 is None else colour(trial.top1), "linewidth": 1.8, "alpha": 0.85}
        axes.plot(range(len(heights)), heights, marker="o", markersize=4, clip_on=False, **line)
    names = short_names(keys)
    for position, (title, scale) in enumerate(
        [*((names[key], scale) for key, scale in zip(keys, scales, strict=True)), ("val top-1", top1)]
    ):
        _draw_axis(axes, position, title, scale)
    axes.set_xlim(-0.3, len(keys) + 0.3)
    axes.set_ylim(-0.05, 1.05)
    axes.axis("off")
    return _png(canvas)


def draw_trial_curves(trials: Sequence[TrialRecord]) -> bytes:
    """A PNG of 1200x800: validation top-1 of each trial over its epochs, with a mark at its end.

    A cross where it was stopped or failed, a square at the accuracy of a finished trial. Trials of heads on cached
    features have no epochs, only the square.
    """
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    figure, canvas = _figure()
    axes = figure.subplots()
    known = [trial.top1 for trial in trials if trial.top1 is not None]
    colour = _colours(known)
    ranked = sorted(trials, key=lambda trial: -1.0 if trial.top1 is None else -trial.top1)
    for rank, trial in enumerate(ranked):
        if trial.top1 is None:
            continue
        label = f"{trial.trial}: {describe_values(trial.values)}" if rank < _MAX_LABELLED else None
        epochs = [*trial.epochs]
        last_epoch = epochs[-1][0] if epochs else 0
        line = {"color": colour(trial.top1), "label": label}
        if epochs:
            axes.plot(*zip(*epochs, strict=True), marker=".", linewidth=1.5, **{**line, "label": None})
        marker = "s" if trial.state is TrialState.FINISHED else "x"
        axes.plot([last_epoch], [trial.top1], marker=marker, linestyle="none", **line)
    axes.set_xlabel("epoch")
    axes.set_ylabel("validation top-1")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)
    if known:
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return _png(canvas)


class _Scale:
    """Where a value stands on an axis from 0 to 1: numbers by size, everything else by its name."""

    def __init__(self, values: Sequence[Any]) -> None:
        known = [value for value in values if value is not None]
        self._is_number = bool(known) and all(
            isinstance(value, int | float) and not isinstance(value, bool) for value in known
        )
        self._names = {} if self._is_number else _names_of(known)
        self._low: float = min(known) if self._is_number else 0.0
        self._high: float = max(known) if self._is_number else 1.0
        # Rates that span more than a factor of 20 were drawn over orders of magnitude.
        self._is_log = self._is_number and self._low > 0 and self._high / self._low > 20

    def height(self, value: Any) -> float:
        """Between 0 and 1; the middle for an axis with one value, and not a number for a missing one."""
        if value is None:
            return math.nan
        if not self._is_number:
            return self._position(list(self._names).index(canonical_json(value)))
        measure: Callable[[float], float] = math.log if self._is_log else float
        low, high = measure(self._low), measure(self._high)
        return (measure(value) - low) / (high - low) if high > low else 0.5

    def ticks(self) -> list[tuple[float, str]]:
        """Heights and what stands at them."""
        if not self._is_number:
            return [(self._position(index), name) for index, name in enumerate(self._names.values())]
        values = [self._low] if self._low == self._high else [self._low, self._high]
        return [(self.height(value), f"{value:.4g}") for value in values]

    def _position(self, index: int) -> float:
        return index / (len(self._names) - 1) if len(self._names) > 1 else 0.5


def _names_of(values: Sequence[Any]) -> dict[bytes, str]:
    """A name for each distinct value, by the value's JSON, sorted by name; values that look alike are numbered."""
    shown = {canonical_json(value): shown_value(value) for value in values}
    counts: Counter[str] = Counter()
    names = {}
    for value, name in sorted(shown.items(), key=lambda item: (item[1], item[0])):
        counts[name] += 1
        names[value] = name if counts[name] == 1 else f"{name} ({counts[name]})"
    return names


def _draw_axis(axes: Any, position: int, title: str, scale: _Scale) -> None:
    axes.plot([position, position], [0, 1], color="#666666", linewidth=1, zorder=0)
    axes.text(position, 1.04, title, ha="center", va="bottom", fontweight="bold")
    for height, text in scale.ticks():
        axes.text(position + 0.02, height + 0.012, text, ha="left", va="bottom", fontsize=9, color="#444444")


def _colours(known: Sequence[float]) -> Callable[[float], Any]:
    from matplotlib import colormaps  # noqa: PLC0415

    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    # Viridis without its yellow, which is hard to see on white.
    return lambda top1: colormaps["viridis"](0.85 * (top1 - low) / (high - low) if high > low else 0.4)


def _figure() -> tuple[Any, Any]:
    # Imported here, because it takes a second and only searches need it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=_SIZE_INCHES, dpi=_DPI, layout="constrained")
    return figure, FigureCanvasAgg(figure)


def _png(canvas: Any) -> bytes:
    buffer = io.BytesIO()
    # Not savefig: the size must not hang on the reader's matplotlibrc.
    canvas.print_png(buffer)
    return buffer.getvalue()
