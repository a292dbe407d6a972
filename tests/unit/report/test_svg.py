from __future__ import annotations

import re
from importlib.resources import files

import pytest

from convoy.report.figures import bars_by_name, confusion_matrix
from convoy.report.svg import NUM_COLOURS, Chart, Scale
from made_pages import QUOTES, SCRIPT

STYLE = (files("convoy.report") / "templates" / "style.css").read_text(encoding="utf-8")
# What WCAG 2 asks of text, and of parts of graphics that carry meaning.
TEXT, GRAPHICS = 4.5, 3.0


@pytest.mark.parametrize(
    ("scale", "value", "share"),
    [
        (Scale(0, 10), 2.5, 0.25),
        (Scale(1, 100, is_log=True), 10, 0.5),
        (Scale(3, 3), 3, 0.5),
        (Scale(4, 4, is_log=True), 4, 0.5),
    ],
)
def test_a_value_stands_where_its_scale_says(scale: Scale, value: float, share: float) -> None:
    assert scale.share(value) == pytest.approx(share)


@pytest.mark.parametrize(
    "scale",
    [
        Scale(0, 1),
        Scale(0.9012, 0.9013),
        Scale(-3, 1e9),
        Scale(1e-12, 2e-12),
        Scale(1, 1e6, is_log=True),
        Scale(100, 130, is_log=True),
        Scale(0.002, 0.5, is_log=True),
    ],
)
def test_ticks_are_some_and_within_the_limits(scale: Scale) -> None:
    ticks = scale.ticks()
    assert 2 <= len(ticks) <= 20
    assert ticks == sorted(ticks)
    room = 1e-6 * (scale.high - scale.low)
    assert all(scale.low - room <= tick <= scale.high + room for tick in ticks)


def test_a_scale_around_nothing_is_still_a_scale() -> None:
    scale = Scale.around([float("nan")])
    assert scale.low < scale.high


def test_marks_stand_at_their_values() -> None:
    chart = Chart(Scale(0, 10), Scale(0, 1), x_label="x", y_label="y")
    chart.dots([(0, 0, "zero"), (10, 1, "one")], 0, name="series")
    drawn = chart.draw("a chart")
    circles = re.findall(r'<circle class="mark" cx="([\d.]+)" cy="([\d.]+)" r="4"><title>(\w+)', drawn)
    assert circles == [
        (f"{chart.left(0):.1f}", f"{chart.top(0):.1f}", "zero"),
        (f"{chart.left(10):.1f}", f"{chart.top(1):.1f}", "one"),
    ]
    assert chart.left(0) < chart.left(10)
    assert chart.top(0) > chart.top(1)


def test_no_two_of_many_series_look_alike() -> None:
    """By colour, dash and shape together."""
    looks = []
    for number in range(3 * NUM_COLOURS):
        chart = Chart(Scale(0, 1), Scale(0, 1), x_label="x", y_label="y")
        chart.line([(0.0, 0.0), (1.0, 1.0)], number)
        chart.dots([(0.5, 0.5, "")], number)
        looks.append(str(chart.draw("one series")))
    assert len(set(looks)) == len(looks)


def test_texts_of_drawings_are_escaped() -> None:
    chart = Chart(Scale(0, 1), Scale(0, 1), x_label=SCRIPT, y_label=QUOTES)
    chart.dots([(0.5, 0.5, SCRIPT)], 1, name=QUOTES)
    chart.zone(0, 1, SCRIPT, 0)
    chart.label(0.5, 0.5, QUOTES)
    drawings = [
        chart.draw(QUOTES),
        bars_by_name([(SCRIPT, [1, 2])], [QUOTES, SCRIPT], SCRIPT),
        confusion_matrix([SCRIPT, QUOTES], [[1, 2], [3, 4]], [3, 7], QUOTES),
    ]
    for drawn in drawings:
        assert "<script" not in drawn
        assert "<svg/" not in drawn
        assert drawn.count("<svg") == 1


def test_the_matrix_shows_each_count_in_its_place_and_of_how_many_it_is() -> None:
    drawn = confusion_matrix(["a", "b"], [[11, 22], [33, 44]], [33, 100], "counts")
    titles = re.findall(r"<title>(\w) taken for (\w): (\d+) of (\d+)</title>", drawn)
    assert titles == [
        ("a", "a", "11", "33"),
        ("a", "b", "22", "33"),
        ("b", "a", "33", "100"),
        ("b", "b", "44", "100"),
    ]
    shares = [float(one) for one in re.findall(r'fill-opacity="([\d.]+)"', drawn)]
    assert shares[3] / shares[0] == pytest.approx(0.44 / (11 / 33), abs=0.01)


@pytest.mark.parametrize("theme", ["light", "dark", "print"])
def test_colours_are_legible_in_every_theme(theme: str) -> None:
    colours = _colours(theme)
    for ground in ("paper", "tint"):
        for name in ("ink", "soft", "link"):
            assert _contrast(colours[name], colours[ground]) >= TEXT, (name, ground)
        for name in (f"c{number}" for number in range(6)):
            assert _contrast(colours[name], colours[ground]) >= GRAPHICS, (name, ground)


@pytest.mark.parametrize("theme", ["light", "dark", "print"])
def test_counts_are_legible_on_the_deepest_cell(theme: str) -> None:
    colours = _colours(theme)
    for name in ("c0", "c1"):
        cell = _mixed(colours[name], colours["paper"], 0.5)
        assert _contrast(colours["ink"], cell) >= TEXT, name


def _colours(theme: str) -> dict[str, str]:
    light, dark, paper = (block for block in re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL))
    block = {"light": light, "dark": dark, "print": paper}[theme]
    return dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block))


def _mixed(over: str, under: str, opacity: float) -> str:
    parts = [(int(over[at : at + 2], 16), int(under[at : at + 2], 16)) for at in (1, 3, 5)]
    return "#" + "".join(f"{round(opacity * top + (1 - opacity) * bottom):02x}" for top, bottom in parts)


def _contrast(first: str, second: str) -> float:
    lighter, darker = sorted((_luminance(first), _luminance(second)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(colour: str) -> float:
    """Relative luminance by WCAG 2."""
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
