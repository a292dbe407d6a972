"""The report of `convoy bench evaluate` as a page for people."""

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
    settings = report["settings"]
    yield "# `convoy bench evaluate`"
    yield ""
    yield (
        f"Ten crops of {settings['crop_px']} pixels out of {report['images']['num_images']} made JPEGs of about "
        f"500x375, {report['images']['mean_bytes'] / 1000:.0f} kB each on average; {settings['repeats']} repeats "
        f"in turn, batches of {settings['batch_size']} images."
    )
    yield ""
    yield from describe_machine(report["machine"])
    for size, measured in report["committees"].items():
        archs = ", ".join(arch.partition(":")[2] or arch for arch in settings["archs"][: int(size)])
        yield from ("", f"## Networks: {size}", "")
        yield f"{archs}; ours and the bounds in {measured['precision']} on {measured['device']}. {_shares(measured)}"
        yield from spread_table("ratio", measured["ratios"], digits=3)
        yield from spread_table("images per second", measured["images_per_s"], digits=2)
        yield from spread_table("bound, images per second", measured["bounds"], digits=2)
    yield ""
    for way, equality in report["equality"].items():
        yield (
            f"Our float32 joint outputs against {way}: at most {equality['max_abs_difference']:.3g} apart, "
            f"cosine at least {equality['min_cosine']:.6f}, {equality['min_centred_cosine']:.5f} about the mean."
        )
    yield from ("", "## Gated", "")
    yield from [report["gated"]] if isinstance(report["gated"], str) else _gated(report["gated"])


def _shares(measured: dict[str, Any]) -> str:
    others = ", ".join("unknown" if share is None else f"{share:.1%}" for share in measured["others_share"])
    networks = ", ".join(f"{share:.1%}" for share in measured["network_share"])
    return f"While our slices were under way, networks had {networks} of the machine, the driver and Ray {others}."


def _gated(gated: dict[str, Any]) -> Iterator[str]:
    looks = [gated["gate"], *gated["gate"]["then"]]
    words = [
        f"members {', '.join(map(str, look['members']))} at {look['policy']} from {look['threshold']:.3f} on"
        for look in looks
    ]
    yield (
        f"Four ResNets on {gated['num_images']} images of CIFAR-10 that the gate was not calibrated on. "
        f"What is believed: {'; then '.join(words)}; then all members at all crops."
    )
    yield ""
    yield "| measure | value |"
    yield "| --- | --- |"
    for name in ("agreement", "speedup", "time_ratio", "top1", "exact_top1"):
        yield f"| {name} | {gated[name]:.4f} |"
    yield from ("", "| target agreement | agreement | speedup | top1 |", "| --- | --- | --- | --- |")
    for point in gated["curve"]:
        yield (
            " | ".join(
                [
                    f"| {point['target_agreement']}",
                    *(f"{point[key]:.4f}" for key in ("agreement", "speedup", "top1")),
                ]
            )
            + " |"
        )
