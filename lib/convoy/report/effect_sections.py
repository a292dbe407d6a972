"""The section about what augmentation does to accuracy."""

from __future__ import annotations

from collections.abc import Sequence

from convoy.pipelines.augmentation_effect import AugmentationEffect
from convoy.pipelines.augmentation_outcomes import PolicyEffect
from convoy.report.blocks import Block, Figure, Notes, Section, Table, text_table
from convoy.report.svg import Chart, Scale
from convoy.report.words import percent, points


def effect_section(found: AugmentationEffect) -> Section:
    """The gain or loss of each kind and strength, with warnings where a kind breaks labels."""
    by = f"a probe on {found.tap}, {found.views} drawn views" if found.tap else "a short fine-tuning"
    blocks: list[Block] = [_effect_figure(found.effects)]
    if found.warnings:
        blocks.append(Notes(title="Warnings", texts=found.warnings))
    blocks.append(_effect_table(found.effects))
    return Section(
        key="augmentation-effect",
        title="What augmentation does",
        lead=f"Top-1 with each kind less {percent(found.without.estimate)} without, by {by}, on"
        f" {found.num_judged_rows:,} rows.",
        blocks=blocks,
    )


def _effect_figure(effects: Sequence[PolicyEffect]) -> Figure:
    ranked = sorted(effects, key=lambda one: -one.difference.estimate)
    chart = Chart(
        Scale(0.5, len(ranked) + 0.5),
        Scale.around(
            [0.0, *(value for one in ranked for value in (one.difference.low, one.difference.high))]
        ),
        x_label="kinds and strengths, the best first",
        y_label="top-1, points",
        y_text=lambda value: f"{100 * value:+.3g}",
        x_ticks=[],
    )
    chart.line([(0.5, 0.0), (len(ranked) + 0.5, 0.0)], 2)
    for number_, (is_warned, name) in enumerate(((False, "no harm found"), (True, "with a warning"))):
        some = [
            (place, one)
            for place, one in enumerate(ranked, start=1)
            if (one.warning is not None) is is_warned
        ]
        chart.whiskers([(place, one.difference.low, one.difference.high) for place, one in some], number_)
        marks = [
            (place, one.difference.estimate, f"{_effect_name(one)}: {points(one.difference.estimate)}")
            for place, one in some
        ]
        if marks:
            chart.dots(marks, number_, name=name)
    return Figure(
        key="augmentation-effects",
        title="Gain or loss of each kind, with 95 % intervals",
        picture=chart.draw("Change of top-1 by each kind of augmentation"),
        data=[one.model_dump(mode="json") for one in ranked],
        is_wide=True,
    )


def _effect_table(effects: Sequence[PolicyEffect]) -> Table:
    rows = [
        [
            _effect_name(one),
            percent(one.top1.estimate),
            points(one.difference.estimate),
            f"{points(one.difference.low)} to {points(one.difference.high)}",
            f"{one.adjusted_p:.2g}",
            one.verdict.value,
            "; ".join(
                f"{pair.first} and {pair.second} {pair.without} to {pair.with_policy}"
                for pair in one.confused[:3]
            ),
            one.warning or "",
        ]
        for one in sorted(effects, key=lambda one: -one.difference.estimate)
    ]
    columns = ["kind*", "top-1", "points", "95 %", "p", "verdict*", "pairs confused more often*", "warning*"]
    return text_table(columns, rows, title="Kinds, the best first")


def _effect_name(one: PolicyEffect) -> str:
    return one.name if one.strength is None else f"{one.name}, {one.strength.value}"
