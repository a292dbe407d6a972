"""The report of a benchmark as a page for people."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from machine import describe_machine


def write_results(path: Path, report: dict[str, Any]) -> None:
    """Write the report as Markdown: machine, ratios, rates and bounds of each image set."""
    path.write_text("\n".join(_page(report)) + "\n", encoding="utf-8")


def _page(report: dict[str, Any]) -> Iterator[str]:
    settings = report["settings"]
    yield "# `convoy bench cache`"
    yield ""
    yield f"ResNet-18 at 224 pixels, {settings['repeats']} repeats in turn, batches of {settings['batch_size']}."
    yield ""
    yield from describe_machine(report["machine"])
    for name, measured in report["sets"].items():
        yield from ("", f"## Images: {name}", "")
        yield from [measured["skipped"]] if "skipped" in measured else _measured(measured)


def _measured(measured: dict[str, Any]) -> Iterator[str]:
    images = measured["images"]
    yield f"{images['num_images']} images, {images['mean_bytes'] / 1000:.0f} kB each on average."
    yield from spread_table("ratio", measured["ratios"], digits=2)
    rates = {name: way["images_per_s"] for name, way in measured["ways"].items()}
    yield from spread_table("images per second, steady", rates, digits=1)
    for title, key in (("seconds to the first row", "first_row_s"), ("seconds in all", "wall_s")):
        yield from spread_table(title, {name: way[key] for name, way in measured["ways"].items()}, digits=1)
    yield from spread_table("bound, images per second", measured["bounds"], digits=1)
    yield ""
    for peer, equality in measured["equality"].items():
        yield (
            f"Our float32 features against {peer}: at most {equality['max_abs_difference']:.3g} apart, "
            f"cosine at least {equality['min_cosine']:.6f}, {equality['min_centred_cosine']:.5f} about the mean."
        )


def spread_table(title: str, spreads: dict[str, Any], *, digits: int) -> Iterator[str]:
    """Lines of a Markdown table with one `spread` in each row."""
    yield ""
    yield f"| {title} | lowest | median | highest |"
    yield "| --- | --- | --- | --- |"
    for name, values in spreads.items():
        numbers = " | ".join(f"{values[key]:.{digits}f}" for key in ("min", "median", "max"))
        yield f"| {name} | {numbers} |"
