"""The section about parts of the data: where a model is worse than on the whole."""

from __future__ import annotations

from collections.abc import Sequence

from convoy.pipelines.report_subgroups import Subgroup
from convoy.report.blocks import Cell, Column, Row, Section, Table
from convoy.report.figures import span_floor, span_glyph
from convoy.report.words import count, percent, span


def subgroups_section(groups: Sequence[Subgroup], top1: float) -> Section:
    """Top-1 by split, size and kind of file; groups whose interval lies below the whole's top-1 stand out."""
    floor = span_floor([group.top1 for group in groups])
    rows = [
        Row(
            (
                Cell(group.axis),
                Cell(group.value),
                Cell(count(group.rows)),
                Cell(percent(group.top1.estimate)),
                Cell(span(group.top1)),
                Cell(picture=span_glyph(group.top1, floor)),
            ),
            is_chosen=group.top1.high < top1,
        )
        for group in groups
    ]
    table = Table(
        key="subgroups",
        title="Top-1 by what rows have in common",
        columns=[
            Column("by", is_text=True),
            Column("group", is_text=True),
            Column("rows"),
            Column("top-1"),
            Column("95 %"),
            Column(""),
        ],
        rows=rows,
        data=[group.model_dump() for group in groups],
        caption=f"Whole: {percent(top1)}. Bold: the interval lies below it; by chance one in forty does.",
    )
    return Section(key="subgroups", title="Parts of the data", blocks=[table])
