"""Figures that several pages draw: bars by name, matrices, reliability diagrams, spans of intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from convoy.core.metrics import ReliabilityBin
from convoy.core.statistics import Interval
from convoy.report.html import shorten
from convoy.report.svg import Chart, Scale, number_text, percent_text, shape, svg, text_tag, title_tag

_ROW, _NAME, _BAR, _VALUE = 22, 150, 310, 100
_CELL, _MIN_CELL = 34, 20
_MATRIX_NAME = 120
# So much of the colour that ink stays legible on it, in both themes.
_MOST_OPAQUE = 0.5


def bars_by_name(
    rows: Sequence[tuple[str, Sequence[float]]], parts: Sequence[str], description: str
) -> Markup:
    """A horizontal bar for each name, made of parts; the legend names the parts where there are several."""
    longest = max((sum(values) for _, values in rows), default=0) or 1
    body = []
    for place, (name, values) in enumerate(rows):
        top, left = place * _ROW, float(_NAME)
        body.append(text_tag(_NAME - 8, top + 15, shorten(name, 20), anchor="end"))
        for part, value in enumerate(values):
            width = _BAR * value / longest
            title = f"{name}, {parts[part]}: {number_text(value)}"
            body.append(
                f'<g class="c{part}"><rect class="fill" x="{left:.1f}" y="{top + 3}" width="{max(width - 0.5, 0):.1f}"'
                f' height="{_ROW - 6}">{title_tag(title)}</rect></g>'
            )
            left += width
        body.append(text_tag(left + 6, top + 15, number_text(sum(values)), soft=True))
    height = len(rows) * _ROW
    if len(parts) > 1:
        left = float(_NAME)
        for part, name in enumerate(parts):
            body.append(
                f'<g class="c{part}"><rect class="fill" x="{left:g}" y="{height + 8}" width="12" height="12"/></g>'
            )
            body.append(text_tag(left + 18, height + 18, name))
            left += 40 + 7.2 * len(name)
        height += 26
    return svg("".join(body), _NAME + _BAR + _VALUE, height, description)


def confusion_matrix(
    names: Sequence[str], counts: Sequence[Sequence[int]], totals: Sequence[int], description: str
) -> Markup:
    """Rows are true classes, columns predicted ones; the deeper the colour, the larger the share of the row.

    `totals` are of whole rows: more than the counts where some predicted classes are not shown.
    """
    cell = _CELL if len(names) <= 14 else _MIN_CELL
    body = [text_tag(_MATRIX_NAME, 12, "predicted", soft=True), text_tag(4, 12, "true", soft=True)]
    top_px = 100
    for column, name in enumerate(names):
        left = _MATRIX_NAME + column * cell + cell / 2 + 4
        body.append(
            f'<g transform="translate({left:g} {top_px - 6}) rotate(-55)">{text_tag(0, 0, shorten(name, 13))}</g>'
        )
    for row, (values, total) in enumerate(zip(counts, totals, strict=True)):
        top = top_px + row * cell
        body.append(text_tag(_MATRIX_NAME - 8, top + cell / 2 + 4, shorten(names[row], 16), anchor="end"))
        for column, count in enumerate(values):
            title = f"{names[row]} taken for {names[column]}: {count} of {total}"
            body.append(
                _cell(
                    _MATRIX_NAME + column * cell,
                    top,
                    cell,
                    count,
                    count / max(total, 1),
                    row == column,
                    title,
                )
            )
    side = len(names) * cell
    return svg("".join(body), max(_MATRIX_NAME + side + 60, 420), top_px + side + 4, description)


def overlap_matrix(names: Sequence[str], shares: Sequence[Sequence[float]], description: str) -> Markup:
    """Shares in 0..1 of each two of the names."""
    body = []
    for row, values in enumerate(shares):
        body.append(text_tag(192, row * 36 + 23, shorten(names[row], 26), anchor="end"))
        for column, share in enumerate(values):
            left = 200 + column * 52
            body.append(
                f'<g class="c0"><rect class="fill" fill-opacity="{_MOST_OPAQUE * share:.3f}" x="{left}" y="{row * 36}"'
                f' width="50" height="34">{title_tag(f"{names[row]} and {names[column]}: {share:.4f}")}</rect></g>'
            )
            body.append(text_tag(left + 25, row * 36 + 22, f"{share:.2f}", anchor="middle"))
    for column in range(len(names)):
        body.append(
            text_tag(225 + column * 52, len(names) * 36 + 14, f"{column + 1}", anchor="middle", soft=True)
        )
    return svg("".join(body), max(560, 200 + 52 * len(names)), len(names) * 36 + 22, description)


def reliability_diagram(bins: Sequence[ReliabilityBin], description: str) -> Markup:
    """Accuracy against confidence, and the share of rows of each bin as bars behind it (Guo et al. 2017, figure 4)."""
    total = sum(one.num_rows for one in bins) or 1
    unit = Scale(0.0, 1.0)
    chart = Chart(unit, unit, x_label="confidence", y_label="accuracy, and share of rows")
    chart.bars(
        (
            one.low,
            one.high,
            one.num_rows / total,
            f"{one.num_rows:,} rows, {percent_text(one.num_rows / total)}",
        )
        for one in bins
    )
    chart.diagonal()
    known = [
        (one.mean_confidence, one.accuracy, one.num_rows)
        for one in bins
        if one.mean_confidence is not None and one.accuracy is not None
    ]
    chart.line([(confidence, accuracy) for confidence, accuracy, _ in known], 0)
    chart.dots(
        [
            (confidence, accuracy, f"confidence {confidence:.3f}, accuracy {accuracy:.3f}, {rows:,} rows")
            for confidence, accuracy, rows in known
        ],
        0,
    )
    return chart.draw(description)


def span_floor(intervals: Sequence[Interval]) -> float:
    """Where drawings of these rates may begin: a tenth that lies below all of them."""
    lowest = min((interval.low for interval in intervals), default=0.0)
    return min(math.floor(lowest * 10) / 10, 0.9)


def span_glyph(interval: Interval, floor: float) -> Markup:
    """A small drawing of a rate between `floor` and 1 with its interval."""
    width = 140
    low, at, high = (
        (value - floor) / (1 - floor) * width for value in (interval.low, interval.estimate, interval.high)
    )
    text = f"{percent_text(interval.estimate)}, {percent_text(interval.low)} to {percent_text(interval.high)}"
    body = (
        f'<path class="grid" d="M0 9H{width}"/><g class="c0">'
        f'<path class="line" d="M{low:.1f} 9H{max(high, low + 0.5):.1f}"/>'
        f"{shape(0, min(max(at, 4), width - 4), 9, 4)}</g>"
    )
    return svg(body, width, 18, text)


def _cell(left: float, top: float, side: int, count: int, share: float, is_right: bool, title: str) -> str:
    # Errors are few: the root makes them visible beside the right ones.
    strength = share if is_right else share**0.5
    opacity = _MOST_OPAQUE * strength
    colour = "c0" if is_right else "c1"
    text = (
        text_tag(left + side / 2, top + side / 2 + 4, f"{count}", anchor="middle")
        if count and side == _CELL
        else ""
    )
    return (
        f'<g class="{colour}"><rect class="fill" fill-opacity="{opacity:.3f}" x="{left:g}" y="{top:g}"'
        f' width="{side - 1}" height="{side - 1}">{title_tag(title)}</rect></g>{text}'
    )
