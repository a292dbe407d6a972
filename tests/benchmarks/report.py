"""`convoy bench report`: how large the page of an evaluation is, how long it takes to write, and a browser to load.

    python tests/benchmarks/report.py [key=value ...]

Made images in class folders are evaluated with random weights, so that all kinds of errors are there to be shown. A
browser is the one that the tests of pages use; without one the page is only measured. Progress goes to stderr; the last
line on stdout is the report as JSON. The keys are the fields of `ReportBench`.
"""

from __future__ import annotations

import base64
import json
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from images import made_image
from machine import describe_machine, machine_facts
from measuring import BenchSettings, convoy, run_benchmark, say
from pydantic import PositiveInt

_SIDE_PX = 64
_WINDOW_PX = (1100, 1400)
# When everything of a page is there, by the browser's own clock.
_LOADED_MS = "performance.getEntriesByType('navigation')[0].loadEventEnd"


class ReportBench(BenchSettings):
    """The page of how many images of how many classes, loaded how often; `screenshots` is a folder for what is seen."""

    num_images: PositiveInt = 10_000
    num_classes: PositiveInt = 100
    loads: PositiveInt = 5
    screenshots: str | None = None


def run_report_bench(settings: ReportBench) -> dict[str, Any]:
    """The size of the page first."""
    with TemporaryDirectory() as folder:
        path, write_s = _write_page(settings, Path(folder))
        size_bytes = path.stat().st_size
        return {
            "size_mb": size_bytes / 1e6,
            **_load(settings, path, Path(folder)),
            "write_s": write_s,
            "machine": machine_facts(),
            "settings": settings.model_dump(mode="json"),
        }


def _write_page(settings: ReportBench, folder: Path) -> tuple[Path, float]:
    """The page, and the seconds of the command that writes it."""
    say(f"{settings.num_images} images are made and evaluated")
    for index in range(settings.num_images):
        label = index % settings.num_classes
        path = folder / "images" / "test" / f"class {label:03d}" / f"{index:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        made_image(np.random.default_rng([0, index]), _SIDE_PX).save(path, quality=90)
    workspace = ("--workspace", str(folder / "workspace"))
    convoy("dataset", str(folder / "images"), "--name", "images", *workspace)
    preset = {"resize_px": 32, "crop_px": 32}
    backbone = {"arch": "lenet5", "weights": "random", "num_classes": settings.num_classes, "preset": preset}
    classes = [f"class {label:03d}" for label in range(settings.num_classes)]
    config = folder / "evaluate.yaml"
    model = {"backbone": backbone, "classes": classes}
    config.write_text(json.dumps({"dataset": "images", "splits": ["test"], "model": model}), encoding="utf-8")
    run = convoy("evaluate", "--config", str(config), *workspace)["run"]
    page = folder / "report.html"
    started_s = time.monotonic()
    convoy("report", run, "--out", str(page), *workspace)
    return page, time.monotonic() - started_s


def _load(settings: ReportBench, page: Path, folder: Path) -> dict[str, Any]:
    """Median seconds until the page was loaded, each time in a new tab, and how many elements it has."""
    # The driver of the browser is the one of the tests, which are no package.
    sys.path.append(str(Path(__file__).parents[1]))
    from chromium import find_browser, running_browser  # noqa: PLC0415

    browser_path = find_browser()
    if browser_path is None:
        say("no browser: install chromium, or name one in CONVOY_CHROMIUM")
        return {"load_s": None, "elements": None, "browser": None}
    seconds = []
    with running_browser(browser_path, folder) as browser:
        for number in range(settings.loads):
            tab = browser.tab()
            tab.open(page)
            seconds.append(tab.evaluate(_LOADED_MS) / 1000)
            say(f"load {number + 1}: {seconds[-1]:.3f} s")
        if settings.screenshots is not None:
            Path(settings.screenshots).mkdir(parents=True, exist_ok=True)
            tab.resize(*_WINDOW_PX)
            for theme in ("light", "dark"):
                tab.show_as(theme)
                (Path(settings.screenshots) / f"{theme}.png").write_bytes(base64.b64decode(tab.screenshot()))
        version = browser.call("Browser.getVersion", "", {})["product"]
        elements = tab.evaluate("document.querySelectorAll('*').length")
    return {"load_s": statistics.median(seconds), "elements": elements, "browser": version}


def write_page(path: Path, report: dict[str, Any]) -> None:
    """Write the report as Markdown."""
    settings = report["settings"]
    lines = [
        f"# The page of an evaluation of {settings['num_images']:,} images of {settings['num_classes']} classes",
        "",
        *describe_machine(report["machine"]),
        "",
        "| what | value |",
        "| --- | --- |",
        f"| size | {report['size_mb']:.2f} MB |",
        f"| the command that writes it | {report['write_s']:.1f} s |",
    ]
    if report["browser"] is not None:
        lines += [
            f"| elements | {report['elements']:,} |",
            f"| until it is loaded in {report['browser']}, median of {settings['loads']} | {report['load_s']:.2f} s |",
        ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_benchmark(ReportBench, run_report_bench, write_page)
