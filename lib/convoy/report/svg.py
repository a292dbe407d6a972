"""Charts as inline SVG: axes, lines, dots, bars, in the page's own colours, so that they follow its theme.

A mark's exact value is its title, which browsers show under the pointer. Series differ by shape and dash, not by
colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from convoy.report.html import clean, shorten

WIDTH, HEIGHT = 560, 300
NUM_COLOURS = 6
_LEFT, _RIGHT, _TOP, _BOTTOM = 74, 14, 14, 44
_DASHES = ("", "7 4", "2 3", "9 3 2 3", "4 2", "1 4")
_LEGEND_LINE = 20
_CHARACTER = 7.2
_DIGIT = 8.3
# The label of the y axis stands upright at the left, its ticks' texts between it and the axis.
_Y_LABEL, _TICK_GAP = 22, 8


class Scale:
    """Where a value stands between two limits, linearly or by its logarithm, and where ticks are."""

    def __init__(self, low: float, high: float, *, is_log: bool = False) -> None:
        if is_log and low <= 0:
            raise ValueError("a logarithmic scale has positive limits")
        if high <= low:
            low, high = (low / 2, low * 2) if is_log else (low - 0.5, low + 0.5)
        self.low, self.high, self.is_log = low, high, is_log

    @classmethod
    def around(
        cls,
        values: Iterable[float],
        *,
        is_log: bool = False,
        margin: float = 0.06,
        floor: float | None = None,
    ) -> Scale:
        """A scale that holds the values with some room; `floor` is where it ends below at the latest."""
        known = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
        low, high = min(known), max(known)
        if is_log:
            room = (high / low) ** margin if high > low else 1.3
            return cls(low / room, high * room, is_log=True)
        room = margin * (high - low)
        low = low - room if floor is None else max(low - room, floor)
        return cls(low, high + room)

    def share(self, value: float) -> float:
        """0 at the low limit, 1 at the high one."""
        if self.is_log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, num_wanted: int = 5) -> list[float]:
        """Round values within the limits."""
        if self.is_log:
            return self._log_ticks(num_wanted)
        rough = (self.high - self.low) / num_wanted
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [float(f"{index * step:.12g}") for index in range(first, last + 1)]

    def _log_ticks(self, num_wanted: int) -> list[float]:
        exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
            found = [f * 10.0**e for e in exponents for f in factors]
            within = [value for value in found if self.low <= value <= self.high]
            if len(within) >= min(num_wanted, 3):
                return within
        return Scale(self.low, self.high).ticks(num_wanted)


@dataclass(frozen=True, slots=True)
class Series:
    """A name in the legend, and which colour, shape and dash it has."""

    name: str
    number: int
    is_line: bool = False


class Chart:
    """A frame with two axes, and what was drawn into it."""

    def __init__(
        self,
        x: Scale,
        y: Scale,
        *,
        x_label: str,
        y_label: str,
        x_text: Callable[[float], str] | None = None,
        y_text: Callable[[float], str] | None = None,
        x_ticks: Sequence[float] | None = None,
    ) -> None:
        self._x, self._y = x, y
        self._x_label, self._y_label = x_label, y_label
        self._x_text, self._y_text = x_text or number_text, y_text or number_text
        self._x_ticks = x.ticks() if x_ticks is None else list(x_ticks)
        self._y_ticks = y.ticks()
        longest = max((len(self._y_text(value)) for value in self._y_ticks), default=0)
        self._left_edge = max(_LEFT, _Y_LABEL + _DIGIT * longest + _TICK_GAP)
        self._behind: list[str] = []
        self._marks: list[str] = []
        self._legend: list[Series] = []

    def left(self, value: float) -> float:
        """The pixel of a value on the x axis."""
        return self._left_edge + (WIDTH - self._left_edge - _RIGHT) * self._x.share(value)

    def top(self, value: float) -> float:
        """The pixel of a value on the y axis."""
        return HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * self._y.share(value)

    def line(
        self, points: Iterable[tuple[float, float]], number: int, *, name: str = "", steps: bool = False
    ) -> None:
        """A line through the points, in the colour and dash of a series; with a name it is in the legend."""
        path = ""
        for place, (x, y) in enumerate(points):
            left, top = self.left(x), self.top(y)
            path += (
                f"M{left:.1f} {top:.1f}"
                if not place
                else f"{f'H{left:.1f}V' if steps else f'L{left:.1f} '}{top:.1f}"
            )
        dash = _dash(number)
        self._marks.append(f'<g class="c{number % NUM_COLOURS}"><path class="line" d="{path}"{dash}/></g>')
        if name:
            self._legend.append(Series(name, number, is_line=True))

    def dots(
        self, points: Iterable[tuple[float, float, str]], number: int, *, name: str = "", radius: float = 4
    ) -> None:
        """A mark at each point, in the shape of a series, with a title."""
        marks = "".join(shape(number, self.left(x), self.top(y), radius, title) for x, y, title in points)
        self._marks.append(f'<g class="c{number % NUM_COLOURS}">{marks}</g>')
        if name:
            self._legend.append(Series(name, number))

    def ring(self, x: float, y: float, *, radius: float = 9) -> None:
        """A circle around a point."""
        self._marks.append(
            f'<circle class="ink" cx="{self.left(x):.1f}" cy="{self.top(y):.1f}" r="{radius:g}"/>'
        )

    def bubble(self, x: float, y: float, radius: float, number: int, title: str) -> None:
        """A circle whose size says something, over which others stay visible."""
        self._marks.append(
            f'<g class="c{number % NUM_COLOURS}"><circle class="bubble" cx="{self.left(x):.1f}" cy="{self.top(y):.1f}"'
            f' r="{radius:.1f}">{title_tag(title)}</circle></g>'
        )

    def whiskers(self, spans: Iterable[tuple[float, float, float]], number: int) -> None:
        """A vertical line from low to high at each x."""
        path = "".join(
            f"M{self.left(x):.1f} {self.top(low):.1f}V{self.top(high):.1f}" for x, low, high in spans
        )
        self._marks.append(f'<g class="c{number % NUM_COLOURS}"><path class="thin" d="{path}"/></g>')

    def band(self, spans: Sequence[tuple[float, float, float]], number: int) -> None:
        """The area between low and high over x."""
        upper = [f"{self.left(x):.1f} {self.top(high):.1f}" for x, _, high in spans]
        lower = [f"{self.left(x):.1f} {self.top(low):.1f}" for x, low, _ in reversed(spans)]
        path = f"M{'L'.join([*upper, *lower])}Z"
        self._behind.append(
            f'<g class="c{number % NUM_COLOURS}"><path class="fill" fill-opacity=".18" d="{path}"/></g>'
        )

    def bars(self, spans: Iterable[tuple[float, float, float, str]]) -> None:
        """A bar from the x axis up, for each (from, to, height, title)."""
        for start, end, value, title in spans:
            left, right, top = self.left(start) + 1, self.left(end) - 1, self.top(value)
            self._behind.append(
                f'<rect class="bar" x="{left:.1f}" y="{top:.1f}" width="{max(right - left, 0.5):.1f}"'
                f' height="{max(self.top(self._y.low) - top, 0):.1f}">{title_tag(title)}</rect>'
            )

    def zone(self, start: float, end: float, text: str, number: int) -> None:
        """A stretch of the x axis with a name; every other one is tinted."""
        left, right = self.left(start), self.left(end)
        tint = ' class="tint"' if number % 2 else ' fill="none"'
        height = HEIGHT - _TOP - _BOTTOM
        self._behind.append(
            f'<rect{tint} x="{left:.1f}" y="{_TOP}" width="{right - left:.1f}" height="{height}"/>'
            f"{text_tag((left + right) / 2, _TOP + 12 + 14 * (number % 2), text, anchor='middle', soft=True)}"
        )

    def diagonal(self) -> None:
        """The line from one corner to the other."""
        self._behind.append(
            f'<path class="axis" stroke-dasharray="4 4" d="M{self.left(self._x.low):.1f} {self.top(self._y.low):.1f}'
            f'L{self.left(self._x.high):.1f} {self.top(self._y.high):.1f}"/>'
        )

    def label(self, x: float, y: float, text: str) -> None:
        """A text to the right of a point, or to its left where there is no room."""
        left = self.left(x)
        shown = shorten(text, 26)
        to_left = left + 10 + _CHARACTER * len(shown) > WIDTH
        place = left - 10 if to_left else left + 10
        self._marks.append(text_tag(place, self.top(y) + 4, shown, anchor="end" if to_left else "start"))

    def draw(self, description: str) -> Markup:
        """The SVG. The description is what a screen reader says."""
        legend, legend_height = _draw_legend(self._legend, self._left_edge)
        body = "".join([*self._axes(), *self._behind, *self._marks, *legend])
        return svg(body, WIDTH, HEIGHT + legend_height, description)

    def _axes(self) -> Iterable[str]:
        edge, bottom = self._left_edge, HEIGHT - _BOTTOM
        for value in self._y_ticks:
            top = self.top(value)
            yield f'<path class="grid" d="M{edge:g} {top:.1f}H{WIDTH - _RIGHT}"/>'
            yield text_tag(edge - _TICK_GAP, top + 4, self._y_text(value), anchor="end", soft=True)
        for value in self._x_ticks:
            left = self.left(value)
            yield f'<path class="axis" d="M{left:.1f} {bottom}v4"/>'
            yield text_tag(left, bottom + 18, self._x_text(value), anchor="middle", soft=True)
        yield f'<path class="axis" d="M{edge:g} {_TOP}V{bottom}H{WIDTH - _RIGHT}"/>'
        yield text_tag((WIDTH + edge - _RIGHT) / 2, bottom + 37, self._x_label, anchor="middle")
        middle = (bottom + _TOP) / 2
        yield (
            f'<text transform="rotate(-90 14 {middle:g})" x="14" y="{middle:g}" text-anchor="middle">'
            f"{_safe(self._y_label)}</text>"
        )


def shape(number: int, left: float, top: float, radius: float, title: str = "") -> str:
    """A mark: circle, square, triangle, diamond, cross or triangle upside down, by the number of its series.

    Where colours begin anew the shapes are one further on: the seventh series is not that of the first.
    """
    r, arm = radius, 0.7 * radius
    kind = (number + number // NUM_COLOURS) % NUM_COLOURS
    tip = title_tag(title)
    if kind == 0:
        return f'<circle class="mark" cx="{left:.1f}" cy="{top:.1f}" r="{r:g}">{tip}</circle>'
    moves = {
        1: f"m{-r} {-r}h{2 * r}v{2 * r}h{-2 * r}z",
        2: f"m0 {-1.2 * r}l{1.15 * r} {2 * r}h{-2.3 * r}z",
        3: f"m0 {-1.35 * r}l{1.35 * r} {1.35 * r}l{-1.35 * r} {1.35 * r}l{-1.35 * r} {-1.35 * r}z",
        4: f"m{-r / 2} {-1.2 * r}h{r}v{arm}h{arm}v{r}h{-arm}v{arm}h{-r}v{-arm}h{-arm}v{-r}h{arm}z",
        5: f"m0 {1.2 * r}l{1.15 * r} {-2 * r}h{-2.3 * r}z",
    }
    return f'<path class="mark" d="M{left:.1f} {top:.1f}{moves[kind]}">{tip}</path>'


def svg(body: str, width: float, height: float, description: str) -> Markup:
    """An SVG element that fills its place."""
    return Markup(
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{_safe(description)}">{body}</svg>'
    )


def text_tag(left: float, top: float, text: str, *, anchor: str = "start", soft: bool = False) -> str:
    """A text in an SVG, escaped."""
    css = ' class="soft"' if soft else ""
    return f'<text{css} x="{left:.1f}" y="{top:.1f}" text-anchor="{anchor}">{_safe(text)}</text>'


def title_tag(title: str) -> str:
    """What is shown under the pointer."""
    return f"<title>{_safe(title)}</title>" if title else ""


def number_text(value: float) -> str:
    """A number in few characters."""
    if value and abs(value) >= 1e6:
        return f"{value:.3g}".replace("e+0", "e").replace("e+", "e")
    return f"{value:,.10g}" if abs(value) >= 1000 else f"{value:.4g}"


def percent_text(value: float) -> str:
    """A rate in percent, on an axis."""
    return f"{100 * value:.4g} %"


def _draw_legend(legend: Sequence[Series], edge: float) -> tuple[list[str], float]:
    drawn, left = [], edge
    line = 0
    for one in legend:
        name = shorten(one.name, 40)
        width = 30 + _CHARACTER * len(name)
        if left + width > WIDTH and left > edge:
            left, line = edge, line + 1
        middle = HEIGHT + 10 + _LEGEND_LINE * line
        mark = (
            f'<path class="line" d="M{left:g} {middle:g}h18"{_dash(one.number)}/>'
            if one.is_line
            else shape(one.number, left + 9, middle, 4)
        )
        drawn.append(
            f'<g class="c{one.number % NUM_COLOURS}">{mark}</g>{text_tag(left + 24, middle + 4, name)}'
        )
        left += width + 14
    return drawn, (line + 1) * _LEGEND_LINE + 4 if legend else 0


def _dash(number: int) -> str:
    # Where colours begin anew, dashes are one further on.
    dash = _DASHES[(number + number // NUM_COLOURS) % len(_DASHES)]
    return f' stroke-dasharray="{dash}"' if dash else ""


def _safe(text: str) -> Markup:
    return escape(clean(text))
