"""Sections about training: learning curves, and the trials of a search."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from convoy.core.training_events import EpochResult, phase_spans
from convoy.report.blocks import Figure, Section, Table, text_table, values_table
from convoy.report.svg import Chart, Scale, percent_text
from convoy.report.trial_table import describe_values
from convoy.report.words import duration, number, percent, significant

_MAX_TRIALS = 200


def curves_section(history: Sequence[EpochResult]) -> Section:
    """Loss, top-1 and learning rate over the epochs."""
    last = history[-1]
    took = duration(sum(one.seconds for one in history))
    images = f"{last.images_per_s:,.0f} images/s in the last epoch, {took} in all"
    return Section(
        key="curves",
        title="Learning curves",
        lead=f"{len(history)} epochs; {images}.",
        blocks=[
            _curve("loss", "Loss", history, [("train_loss", "train, as optimised"), ("val_nll", "val, NLL")]),
            _curve("top1", "Top-1", history, [("train_top1", "train"), ("val_top1", "val")], is_rate=True),
            _curve("rate", "Learning rate of the head", history, [("learning_rate", "")]),
        ],
    )


def _curve(
    key: str,
    title: str,
    history: Sequence[EpochResult],
    lines: Sequence[tuple[str, str]],
    *,
    is_rate: bool = False,
) -> Figure:
    values = {
        field: [(one.epoch, value) for one in history if (value := getattr(one, field)) is not None]
        for field, _ in lines
    }
    shown = percent if is_rate else significant
    finite = [value for points_ in values.values() for _, value in points_ if math.isfinite(value)]
    is_log = not is_rate and bool(finite) and min(finite) > 0 and max(finite) / min(finite) > 50
    chart = Chart(
        Scale(history[0].epoch - 0.5, history[-1].epoch + 0.5),
        Scale.around(finite, is_log=is_log),
        x_label="epoch",
        y_label=title.lower(),
        y_text=percent_text if is_rate else None,
        x_ticks=_epoch_ticks(history),
    )
    for number_, (phase, (first, last)) in enumerate(phase_spans(history).items()):
        chart.zone(first - 0.5, last + 0.5, phase, number_)
    for place, (field, name) in enumerate(lines):
        points_ = [
            (epoch, value)
            for epoch, value in values[field]
            if math.isfinite(value) and (not is_log or value > 0)
        ]
        if points_:
            chart.line(points_, place, name=name)
            chart.dots(
                [(epoch, value, f"epoch {epoch}: {significant(value)}") for epoch, value in points_],
                place,
                radius=3,
            )
    return Figure(
        key=f"curve-{key}",
        title=title,
        picture=chart.draw(f"{title} over the epochs"),
        data=[
            {"epoch": one.epoch, "phase": one.phase, **{field: getattr(one, field) for field, _ in lines}}
            for one in history
        ],
        values=values_table(
            ["epoch", "phase*", *(name or title.lower() for _, name in lines)],
            [
                [f"{one.epoch}", one.phase, *(shown(getattr(one, field)) for field, _ in lines)]
                for one in history
            ],
        ),
    )


def _epoch_ticks(history: Sequence[EpochResult]) -> list[float]:
    step = max(1, math.ceil(len(history) / 10))
    return [float(one.epoch) for one in history[::step]]


def trials_section(trials: Sequence[Mapping[str, Any]]) -> Section:
    """The trials of a search, the best first."""
    ranked = sorted(trials, key=lambda one: -(one.get("top1") or -1.0))[:_MAX_TRIALS]
    measured = [one for one in ranked if one.get("top1") is not None]
    return Section(
        key="trials",
        title="Trials",
        lead=f"{len(trials)} trials; validation top-1 chooses, so these figures flatter the best.",
        blocks=[
            _trial_figure(measured, _left_out(measured, trials)),
            _trial_table(ranked, _left_out(ranked, trials)),
        ],
    )


def _left_out(shown: Sequence[Mapping[str, Any]], trials: Sequence[Mapping[str, Any]]) -> str:
    if len(shown) == len(trials):
        return ""
    unmeasured = sum(one.get("top1") is None for one in trials)
    return f"The best {len(shown)} of {len(trials)} trials; {unmeasured} of all have no top-1."


def _trial_figure(measured: Sequence[Mapping[str, Any]], caption: str) -> Figure:
    chart = Chart(
        Scale(0.5, max(len(measured), 1) + 0.5),
        Scale.around([value for one in measured for value in _limits(one)]),
        x_label="trials, the best first",
        y_label="validation top-1",
        y_text=percent_text,
        x_ticks=[float(place) for place in range(1, len(measured) + 1, max(1, len(measured) // 10))],
    )
    spans = [(float(place), *_limits(one)) for place, one in enumerate(measured, start=1)]
    chart.whiskers(spans, 0)
    chart.dots(
        [
            (place, one["top1"], f"{one['trial']}: {percent(one['top1'])}, {describe_values(one['values'])}")
            for place, one in enumerate(measured, start=1)
        ],
        0,
    )
    data = [{"trial": one["trial"], "top1": one["top1"], "interval": list(_limits(one))} for one in measured]
    return Figure(
        key="trials",
        title="Validation top-1 with 95 % intervals",
        picture=chart.draw("Validation top-1 of each trial with its interval"),
        data=data,
        caption=caption,
    )


def _limits(trial: Mapping[str, Any]) -> tuple[float, float]:
    interval = trial.get("top1_interval")
    return (interval["low"], interval["high"]) if interval else (trial["top1"], trial["top1"])


def _trial_table(trials: Sequence[Mapping[str, Any]], caption: str) -> Table:
    rows = [
        [
            one["trial"],
            one["state"],
            describe_values(one["values"]),
            percent(one.get("top1")),
            number(one.get("nll")),
            str(one.get("num_epochs", "")),
            duration(one.get("seconds") or 0.0),
            (one.get("reason") or "").splitlines()[0] if one.get("reason") else "",
        ]
        for one in trials
    ]
    columns = ["trial*", "state*", "values*", "val top-1", "val NLL", "epochs", "time", "reason*"]
    title = "What each trial reached"
    return text_table(columns, rows, key="trial-table", title=title, data=list(trials), caption=caption)
