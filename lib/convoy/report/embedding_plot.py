"""Pictures of a sample in feature space: a point is an image."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from convoy.pipelines.embedding_maps import EmbeddingMap, MapColour, MapPoint

_SIZE_INCHES, _DPI = (9, 7), 100
# Colours that can be told apart, and named; further classes share the last entry of the legend.
_MOST_NAMED = 20
_GREY = "#9a9a9a"
# Of Okabe and Ito (2008), for all kinds of colour vision; errors lie on top, with a mark of their own.
_RIGHT, _WRONG = "#56b4e9", "#d55e00"


def draw_embedding_map(placed: EmbeddingMap, colour: MapColour) -> bytes:
    """A PNG of 900x700: the points of a map, coloured by label or by whether the model is right."""
    # Imported here, because it takes a second and only pictures need it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=_SIZE_INCHES, dpi=_DPI, layout="constrained")
    canvas: Any = FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, marker, shade, points in _groups(placed, colour):
        axes.scatter(
            [point.x for point in points],
            [point.y for point in points],
            s=16,
            marker=marker,
            color=shade,
            alpha=0.8,
            linewidths=1.0 if marker == "x" else 0,
            # A space first: labels that begin with a bar are left out of legends.
            label=f" {name} ({len(points)})",
        )
    axes.set_xlabel(_axis_name(placed, 0))
    axes.set_ylabel(_axis_name(placed, 1))
    axes.set_xticks([])
    axes.set_yticks([])
    legend = figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    for text in legend.get_texts():
        # The names of classes are the user's: a dollar sign begins no mathematics.
        text.set_parse_math(False)
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    return buffer.getvalue()


def _groups(placed: EmbeddingMap, colour: MapColour) -> list[tuple[str, str, Any, Sequence[MapPoint]]]:
    """Name, marker, colour and points of each entry of the legend that has some, the last ones on top."""
    if colour is MapColour.ERROR:
        judged = [
            ("no label", "o", _GREY, [point for point in placed.points if point.correct is None]),
            ("right", "o", _RIGHT, [point for point in placed.points if point.correct]),
            ("wrong", "x", _WRONG, [point for point in placed.points if point.correct is False]),
        ]
        return [group for group in judged if group[3]]
    from matplotlib import colormaps  # noqa: PLC0415

    seen = [name for name in placed.classes if any(point.label == name for point in placed.points)]
    named = seen if len(seen) <= _MOST_NAMED else seen[: _MOST_NAMED - 1]
    others = [point for point in placed.points if point.label not in named]
    palette = colormaps["tab10" if len(named) <= 10 else "tab20"]
    groups: list[tuple[str, str, Any, Sequence[MapPoint]]] = [
        ("others" if len(seen) > len(named) else "no label", "o", _GREY, others)
    ]
    groups += [
        (name, "o", palette(index), [point for point in placed.points if point.label == name])
        for index, name in enumerate(named)
    ]
    return [group for group in groups if group[3]]


def _axis_name(placed: EmbeddingMap, axis: int) -> str:
    if placed.explained is None:
        return f"{placed.method.value.upper()} {axis + 1}"
    return f"component {axis + 1} ({placed.explained[axis]:.0%} of the variance)"
