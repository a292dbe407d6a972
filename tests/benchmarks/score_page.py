"""The report of `convoy bench score` as a page for people, with a plot of memory for each regime."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from comparison import OURS
from machine import describe_machine
from results import spread_table


def write_page(path: Path, report: dict[str, Any]) -> None:
    """Write the report as Markdown, and beside it `<page>-<regime>.png`."""
    path.write_text("\n".join(_page(path, report)) + "\n", encoding="utf-8")


def _page(path: Path, report: dict[str, Any]) -> Iterator[str]:
    yield "# `convoy bench score`"
    yield ""
    yield f"{report['settings']['repeats']} repeats in turn."
    yield ""
    yield from describe_machine(report["machine"])
    for regime, measured in report["measured"].items():
        yield from ("", f"## {regime}", "")
        yield from _measured(measured)
        picture = path.with_name(f"{path.stem}-{regime}.png")
        _plot_memory(picture, measured["ways"][OURS]["details"][-1]["memory_s_driver_workers_mib"])
        yield from ("", f"![memory of driver and workers]({picture.name})")


def _measured(measured: dict[str, Any]) -> Iterator[str]:
    images, workload = measured["images"], measured["workload"]
    yield (
        f"{workload['network']['arch']} at {workload['network']['crop_px']} pixels; {images['num_images']} images, "
        f"{images['mean_bytes'] / 1000:.0f} kB each on average, batches of {workload['batch_size']}."
    )
    yield from spread_table("ratio", measured["ratios"], digits=3)
    for title, key in (
        ("images per second, steady", "images_per_s"),
        ("seconds to the first row", "first_row_s"),
        ("seconds in all", "wall_s"),
    ):
        yield from spread_table(title, {name: way[key] for name, way in measured["ways"].items()}, digits=1)
    yield from spread_table("bound, images per second", measured["bounds"], digits=1)
    yield ""
    for peer, equality in measured["equality"].items():
        yield (
            f"Our float32 logits against {peer}: at most {equality['max_abs_difference']:.3g} apart, "
            f"cosine at least {equality['min_cosine']:.6f}, {equality['min_centred_cosine']:.5f} about the mean."
        )


def _plot_memory(path: Path, samples: list[tuple[float, float, float]]) -> None:
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.add_subplot()
    seconds, driver_mib, workers_mib = zip(*samples, strict=True)
    axes.plot(seconds, driver_mib, label="driver")
    axes.plot(seconds, workers_mib, label="slice workers")
    axes.set(xlabel="seconds since the launch", ylabel="resident memory, MiB", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=120)
