"""The report of `convoy bench train` as a page for people."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from machine import describe_machine
from results import spread_table


def write_page(path: Path, report: dict[str, Any]) -> None:
    """Write the report as Markdown."""
    path.write_text("\n".join(_page(report)) + "\n", encoding="utf-8")


def _page(report: dict[str, Any]) -> Iterator[str]:
    yield "# `convoy bench train`"
    yield ""
    yield (
        f"Made JPEGs of about 500x375, {report['images']['mean_bytes'] / 1000:.0f} kB each on average; "
        f"{report['settings']['repeats']} repeats in turn. Steady rates: all epochs but the first."
    )
    yield ""
    yield from describe_machine(report["machine"])
    for name, measured in report["workloads"].items():
        yield from _workload_section(name, measured, report["settings"][name])
    head = report["head"]
    yield from ("", "## One pass of the head", "")
    yield f"{head['num_rows']} images; the fit on cached features went over them {head['num_passes']} times."
    seconds = {"on cached features": head["cached_s"], "through the frozen body": head["network_s"]}
    yield from spread_table("seconds of one pass", seconds, digits=4)
    yield from spread_table("ratio", {"head_epoch_speedup_from_cache": head["speedup"]}, digits=0)


def _workload_section(name: str, measured: dict[str, Any], workload: dict[str, Any]) -> Iterator[str]:
    yield from ("", f"## {name}-bound: {workload['arch']} at {workload['crop_px']} pixels", "")
    yield (
        f"{workload['epochs']} epochs of {workload['num_images']} images, batches of {workload['batch_size']}; "
        f"ours and the mock loader in {measured['precision']} on "
        f"{measured['device']} with {measured['num_threads']} threads."
    )
    yield from spread_table("ratio", measured["ratios"], digits=3)
    yield from spread_table("images per second, steady", measured["images_per_s"], digits=1)
    yield from spread_table("bound, images per second", measured["bounds"], digits=1)
    yield from spread_table("seconds in all", measured["wall_s"], digits=1)
    shares = ", ".join(f"{details['wait_share']:.1%}" for details in measured["ours"])
    yield ""
    yield f"Our steps stood still for images {shares} of the time."
    equality = measured["equality"]
    yield ""
    yield (
        f"The first {len(equality['ours'])} float64 losses without augmentation, ours against a plain loop over "
        f"torchvision's images: at most {equality['max_relative_difference']:.1e} apart, relatively."
    )
