"""Accuracy against cost of backbones, as bubble charts and tables."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from convoy.pipelines.backbone_costs import BackboneCost
from convoy.pipelines.cost_front import CostFront, FrontChoice
from convoy.report.blocks import Block, Figure, Table, text_table
from convoy.report.svg import Chart, Scale, percent_text
from convoy.report.words import count, percent, size, span

# Radii of the bubbles of the smallest and of the largest network.
_SMALLEST, _LARGEST = 5.0, 22.0


def front_blocks(
    fronts: Sequence[CostFront], costs: Sequence[BackboneCost], names: Sequence[str]
) -> Iterator[Block]:
    """A bubble chart for each axis of cost, why to take which, and what was measured.

    `names` are those of the backbones, in the order of `costs`.
    """
    for front in fronts:
        yield _bubbles(front)
    yield from (_choices(front) for front in fronts)
    if costs:
        yield _cost_table(costs, names)


def _bubbles(front: CostFront) -> Figure:
    choices = front.choices
    most = max(one.num_parameters for one in choices)
    amounts = [max(one.cost, 1e-9) for one in choices]
    chart = Chart(
        Scale.around(amounts, is_log=True, margin=0.15),
        Scale.around([value for one in choices for value in (one.top1.low, one.top1.high)], margin=0.12),
        x_label=front.unit,
        y_label="top-1 of the best probe",
        y_text=percent_text,
    )
    best = sorted((max(one.cost, 1e-9), one.top1.estimate) for one in choices if one.is_best)
    if len(best) > 1:
        chart.line(best, 0, steps=True, name="no cheaper one is as good")
    for is_best, number_, name in ((True, 0, "worth its cost"), (False, 1, "beaten")):
        some = [one for one in choices if one.is_best is is_best]
        chart.whiskers([(max(one.cost, 1e-9), one.top1.low, one.top1.high) for one in some], number_)
        for one in some:
            chart.bubble(
                max(one.cost, 1e-9), one.top1.estimate, _radius(one, most), number_, _choice_title(one, front)
            )
            chart.label(max(one.cost, 1e-9), one.top1.estimate, one.backbone)
        if some:
            chart.dots([], number_, name=name)
    return Figure(
        key=f"front-{front.axis.value}",
        title=f"By {front.axis.value}",
        picture=chart.draw(f"Top-1 against {front.unit}; bubbles by parameters"),
        data=front.model_dump(mode="json"),
        caption=f"{front.num_rows:,} rows; lines are 95 % intervals. Cost: {front.unit}; the whole network counts, also"
        " where its best probe is at an earlier stage.",
        is_wide=len(front.choices) > 6,
    )


def _radius(one: FrontChoice, most: int) -> float:
    """So that areas are as parameters."""
    return max(_LARGEST * math.sqrt(one.num_parameters / max(most, 1)), _SMALLEST)


def _choice_title(one: FrontChoice, front: CostFront) -> str:
    cost = f"{one.cost:.4g} {front.unit}, {one.num_parameters:,} parameters"
    return f"{one.backbone}: {percent(one.top1.estimate)}, {cost}"


def _choices(front: CostFront) -> Table:
    rows = [
        [one.backbone, f"{one.cost:.4g}", percent(one.top1.estimate), span(one.top1), one.explanation]
        for one in front.choices
    ]
    return text_table(
        ["backbone*", "cost", "top-1", "95 %", "why*"],
        rows,
        chosen=[place for place, one in enumerate(front.choices) if one.is_best],
        key=f"choices-{front.axis.value}",
        folded=f"Which backbone to take by {front.axis.value}, and why",
        caption=f"Cost in {front.unit}.",
    )


def _cost_table(costs: Sequence[BackboneCost], names: Sequence[str]) -> Table:
    machines = [one.machine.gpu or one.machine.cpu for one in costs]
    precisions = [one.precision.value for one in costs]
    # What all have in common is said once, below the table.
    varying = {
        name: texts
        for name, texts in (("machine*", machines), ("precision*", precisions))
        if len(set(texts)) > 1
    }
    where = "" if "machine*" in varying else f" on {machines[0]}"
    precision = "" if "precision*" in varying else f", {precisions[0]}"
    rows = [
        [
            name,
            *(texts[place] for texts in varying.values()),
            f"{one.input_px}",
            count(one.macs),
            count(one.num_parameters),
            size(one.size_bytes),
            f"{one.images_per_s:,.1f}",
            f"{one.network_images_per_s:,.1f}",
            f"{one.latency_p50_ms:.3g}",
            f"{one.latency_p95_ms:.3g}",
            "-" if one.peak_memory_bytes is None else size(one.peak_memory_bytes),
            "-" if one.usd_per_million is None else f"{one.usd_per_million:.2f}",
        ]
        for place, (name, one) in enumerate(zip(names, costs, strict=True))
    ]
    columns = [
        "backbone*", *varying, "input px", "multiply-adds", "parameters", "weights", "images/s", "network alone",
        "median ms", "95 % ms", "memory", "price a million",
    ]  # fmt: skip
    least, most = min(one.batch_size for one in costs), max(one.batch_size for one in costs)
    batches = f"{least}" if least == most else f"{least} to {most}"
    caption = f"Measured{where}, batches of {batches}{precision}. {_rates_words(costs)}"
    data = [{"backbone": name, **one.model_dump(mode="json")} for name, one in zip(names, costs, strict=True)]
    return text_table(columns, rows, key="costs", title="What was measured", data=data, caption=caption)


def _rates_words(costs: Sequence[BackboneCost]) -> str:
    ways = {True: ", from the store to features", False: ", of the network alone", None: ""}
    way = ways[costs[0].from_store]
    return f"Images/s are those of all workers together{way}; those of the network alone are of one worker or GPU."
