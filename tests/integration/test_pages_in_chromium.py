"""Pages as a browser shows them: no request, no script, no error; legible, usable by keyboard, printable."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from chromium import Browser, Tab, find_browser, running_browser
from convoy.pipelines.report_index import IndexData, IndexedDataset, IndexedRun
from convoy.pipelines.runs_state import RunState
from convoy.report.index_page import draw_index
from convoy.report.page import draw_page
from convoy.report.svg import Chart, Scale
from made_advice import made_advice
from made_pages import IMAGE, QUOTES, SCRIPT, made_page

pytestmark = pytest.mark.integration

# Of every element with a text of its own: its contrast with the ground that it stands on, by WCAG 2.
CONTRASTS = """
(() => {
  const parse = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = c => {
    const l = c.slice(0, 3).map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * l[0] + 0.7152 * l[1] + 0.0722 * l[2];
  };
  const ground = element => {
    for (let at = element; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const element of document.querySelectorAll('body *')) {
    const own = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
    if (!own || element.tagName === 'title' || element.closest('.skip')) continue;
    const style = getComputedStyle(element);
    const ink = parse(element.closest('svg') ? style.fill : style.color);
    const [a, b] = [light(ink), light(ground(element))].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), element.tagName, element.textContent.trim().slice(0, 40)]);
  }
  return found;
})()
"""

# Charts without any area, or with a mark that sticks out of them.
OUTSIDE = """
[...document.querySelectorAll('svg')].filter(svg => {
  const frame = svg.getBoundingClientRect();
  if (!frame.width || !frame.height) return true;
  return [...svg.querySelectorAll('.mark, .bubble, .ink, rect')].some(mark => {
    const box = mark.getBoundingClientRect();
    return box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1
      || box.bottom > frame.bottom + 1;
  });
}).map(svg => svg.getAttribute('aria-label'))
"""

# Axes whose upright label lies on the text of a tick.
COVERED = """
[...document.querySelectorAll('svg')].filter(svg => {
  const label = svg.querySelector('text[transform^="rotate(-90"]')?.getBoundingClientRect();
  return label && [...svg.querySelectorAll('text:not([transform])')].some(text => {
    const box = text.getBoundingClientRect();
    return box.left < label.right && box.right > label.left && box.top < label.bottom && box.bottom > label.top;
  });
}).map(svg => svg.getAttribute('aria-label'))
"""


def made_index() -> IndexData:
    return IndexData(
        workspace=f"/w/{SCRIPT}",
        datasets=[
            IndexedDataset(
                name=IMAGE,
                fingerprint="f" * 32,
                samples=3,
                classes=2,
                splits={"test": 3},
                source=QUOTES,
                frozen_utc="",
            )
        ],
        runs=[
            IndexedRun(
                run="r1",
                verb="train",
                dataset=IMAGE,
                state=RunState.FINISHED,
                held_by=None,
                done=3,
                inputs=3,
                age="1 h",
                opened_utc=None,
                name=SCRIPT,
                top1=0.5,
            )
        ],
        num_runs=1,
        models=[],
        num_models=0,
        pages={"run:r1": f"{QUOTES}.html"},
        missing=[SCRIPT],
    )


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    path = find_browser()
    if path is None:
        pytest.skip("no browser: install chromium, or name one in CONVOY_CHROMIUM")
    with running_browser(path, tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture(scope="module")
def page_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_bytes(draw_page(made_page()))
    return path


@pytest.fixture
def tab(browser: Browser, page_path: Path) -> Tab:
    tab = browser.tab()
    tab.open(page_path)
    return tab


def test_the_page_asks_for_nothing_and_nothing_goes_wrong(tab: Tab) -> None:
    requested = {event["request"]["url"].partition(":")[0] for event in tab.told("Network.requestWillBeSent")}
    assert requested <= {"file", "data"}
    assert not tab.told("Log.entryAdded")
    assert not tab.told("Runtime.consoleAPICalled")
    assert not tab.told("Page.javascriptDialogOpening")
    assert tab.evaluate("window.hacked") is None
    broken = "[...document.images].filter(image => !image.naturalWidth).length"
    assert tab.evaluate("document.images.length") > 10
    assert tab.evaluate(broken) == 0


def test_the_style_is_the_one_that_the_policy_names(tab: Tab) -> None:
    assert tab.evaluate("document.styleSheets.length") == 1
    assert tab.evaluate("getComputedStyle(document.querySelector('.tiles')).display") == "grid"


def test_a_script_that_gets_in_all_the_same_does_not_run(tab: Tab) -> None:
    tab.evaluate(
        "document.body.insertAdjacentHTML('beforeend', '<img src=https://example.invalid/x onerror=window.hacked=1>');"
        "const s = document.createElement('script'); s.textContent = 'window.hacked=1'; document.body.append(s)"
    )
    assert tab.evaluate("new Promise(done => setTimeout(() => done(window.hacked === undefined), 300))")
    refused = [event["entry"]["text"] for event in tab.told("Log.entryAdded")]
    assert any("Content Security Policy" in text for text in refused)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_all_text_is_legible(tab: Tab, theme: str) -> None:
    tab.show_as(theme)
    ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(23, 25, 27)"}[theme]
    found = tab.evaluate(CONTRASTS)
    assert len(found) > 200
    assert [one for one in found if one[0] < 4.5] == []


@pytest.mark.parametrize("width_px", [320, 768, 1400])
def test_no_window_is_too_narrow(tab: Tab, width_px: int) -> None:
    tab.resize(width_px, 800)
    assert tab.evaluate("document.scrollingElement.scrollWidth") <= width_px


def test_the_keyboard_reaches_everything(tab: Tab) -> None:
    reached: list[Any] = []
    for _ in range(200):
        tab.press("Tab", 9)
        now = tab.evaluate(
            "(e => e && e !== document.body ? [e.tagName, e.className] : null)(document.activeElement)"
        )
        if now is None:
            break
        reached.append(tuple(now))
        if now[0] == "SUMMARY":
            break
    assert reached[0] == ("A", "skip")
    assert ("DIV", "scroll") in reached
    assert reached[-1][0] == "SUMMARY"
    assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    is_open = "document.activeElement.parentElement.open"
    assert tab.evaluate(is_open) is False
    tab.press("Enter", 13)
    assert tab.evaluate(is_open) is True


def test_links_lead_to_places_of_the_page(tab: Tab) -> None:
    lost = "[...document.querySelectorAll('nav a')].filter(a => !document.getElementById(a.hash.slice(1))).length"
    assert tab.evaluate("document.querySelectorAll('nav a').length") > 5
    assert tab.evaluate(lost) == 0


def test_paper_shows_all_in_black_on_white(tab: Tab) -> None:
    tab.show_as("dark", media="print")
    assert tab.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    assert tab.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert [one for one in tab.evaluate(CONTRASTS) if one[0] < 4.5] == []
    printed = base64.b64decode(tab.call("Page.printToPDF", printBackground=True)["data"])
    assert printed.startswith(b"%PDF")
    assert len(printed) > 50_000


def test_figures_are_drawn(tab: Tab) -> None:
    """Every chart covers some area, and its marks lie inside it."""
    tab.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert tab.evaluate("document.querySelectorAll('svg').length") > 10
    assert tab.evaluate(OUTSIDE) == []
    assert tab.evaluate(COVERED) == []
    assert len(tab.screenshot()) > 10_000


@pytest.mark.parametrize("highest", [0.0125, 150_000, 12_345_678])
def test_long_numbers_leave_the_label_of_their_axis_free(
    browser: Browser, tmp_path: Path, highest: float
) -> None:
    chart = Chart(
        Scale(0, 1), Scale(0, highest), x_label="seconds", y_label="a label from the top to the bottom"
    )
    style = resources.files("convoy.report").joinpath("templates/style.css").read_text(encoding="utf-8")
    path = tmp_path / "chart.html"
    path.write_text(f"<style>{style}</style><figure>{chart.draw('a chart')}</figure>", encoding="utf-8")
    tab = browser.tab()
    tab.open(path)
    assert tab.evaluate("document.querySelectorAll('svg text').length") > 8
    assert tab.evaluate(COVERED) == []


@pytest.mark.parametrize("kind", ["advice", "index"])
def test_pages_of_advice_and_of_a_workspace_are_as_sound(browser: Browser, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "page.html"
    advice = made_page(advice=made_advice(), evaluation=None, predictions=None, history=[], data_card=None)
    path.write_bytes(draw_page(advice) if kind == "advice" else draw_index(made_index()))
    tab = browser.tab()
    tab.open(path)
    requested = {event["request"]["url"].partition(":")[0] for event in tab.told("Network.requestWillBeSent")}
    assert requested <= {"file", "data"}
    assert not tab.told("Log.entryAdded")
    assert tab.evaluate("window.hacked") is None
    tab.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    bubbles = tab.evaluate("document.querySelectorAll('.bubble').length")
    assert (bubbles > 3) is (kind == "advice")
    assert tab.evaluate(OUTSIDE) == []
    assert tab.evaluate(COVERED) == []
    for theme in ("light", "dark"):
        tab.show_as(theme)
        assert [one for one in tab.evaluate(CONTRASTS) if one[0] < 4.5] == []
