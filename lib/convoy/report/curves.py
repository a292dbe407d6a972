"""Learning curves as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from convoy.core.training_events import EpochResult, phase_spans

_SIZE_INCHES, _DPI = (12, 8), 100
# Okabe and Ito's colours, which people with colour blindness tell apart.
_TRAIN, _VAL, _RATE = "#0072B2", "#D55E00", "#009E73"
_BANDS = ("#f4f4f4", "#e6e6e6")


def draw_learning_curves(history: Sequence[EpochResult]) -> bytes:
    """A PNG of 1200x800: loss, top-1 and learning rate over the epochs, phases as bands behind them.

    The history has one epoch or more; without validation its lines are missing.
    """
    # Imported here, because it takes a second and only trainings need it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    figure = Figure(figsize=_SIZE_INCHES, dpi=_DPI, layout="constrained")
    canvas: Any = FigureCanvasAgg(figure)
    loss, top1, rate = figure.subplots(3, 1, sharex=True, height_ratios=[3, 3, 1])
    _draw(loss, history, "loss", [("train", "train_loss", _TRAIN), ("val NLL", "val_nll", _VAL)])
    _draw(top1, history, "top-1", [("train", "train_top1", _TRAIN), ("val", "val_top1", _VAL)])
    _draw(rate, history, "rate", [("head's learning rate", "learning_rate", _RATE)])
    if any(epoch.learning_rate > 0 for epoch in history):
        rate.set_yscale("log")
    rate.set_xlabel("epoch")
    rate.set_xlim(history[0].epoch - 0.5, history[-1].epoch + 0.5)
    rate.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _name_phases(loss, history)
    buffer = io.BytesIO()
    # Not savefig: the size must not hang on the reader's matplotlibrc.
    canvas.print_png(buffer)
    return buffer.getvalue()


def _draw(
    axes: Any, history: Sequence[EpochResult], title: str, lines: Sequence[tuple[str, str, str]]
) -> None:
    for number, (first, last) in enumerate(phase_spans(history).values()):
        axes.axvspan(first - 0.5, last + 0.5, color=_BANDS[number % len(_BANDS)], zorder=0)
    for label, field, colour in lines:
        points = [(epoch.epoch, getattr(epoch, field)) for epoch in history]
        known = [(epoch, value) for epoch, value in points if value is not None]
        if known:
            axes.plot(*zip(*known, strict=True), color=colour, marker="o", markersize=3, label=label)
    axes.set_ylabel(title)
    axes.grid(alpha=0.3)
    axes.legend(loc="best", frameon=False)


def _name_phases(axes: Any, history: Sequence[EpochResult]) -> None:
    for number, (name, (first, last)) in enumerate(phase_spans(history).items()):
        # Names of neighbours stand at two heights: a phase of one epoch is narrower than its name.
        axes.annotate(
            name,
            ((first + last) / 2, 1),
            xytext=(0, 4 + 14 * (number % 2)),
            xycoords=axes.get_xaxis_transform(),
            textcoords="offset points",
            ha="center",
            color="#555555",
        )
