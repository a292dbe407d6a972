"""Sections about a run itself: its slices, its forecast against the truth, its records, and where it comes from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from convoy.core.config import write_settings
from convoy.pipelines.model_listing import ModelDescription
from convoy.pipelines.report_lineage import LineageLink
from convoy.pipelines.report_slices import SlicePoint, SliceSummary
from convoy.pipelines.runs_show import RunDescription
from convoy.report.blocks import (
    Block,
    Chain,
    Code,
    Facts,
    Figure,
    Link,
    Section,
    Table,
    text_table,
    values_table,
)
from convoy.report.figures import bars_by_name
from convoy.report.svg import Chart, Scale
from convoy.report.words import count, duration, percent, size

# A run that is partitioned by labels has one for each.
_MOST_OUTPUTS = 20
_SLICE_COLUMNS = ("slice*", "began after", "took", "rows", "rejects", "images/s")
_FORECAST_ROWS = {
    "images": "images",
    "images_per_s": "images/s",
    "hours": "hours of work",
    "bytes_read": "bytes read",
    "bytes_written": "bytes written",
    "get_requests": "GET requests",
    "put_requests": "PUT requests",
}
# Results that have sections of their own, or are as long as the data.
_LONG = frozenset(
    {
        "confusion", "confusion_entries", "per_class", "reliability", "history", "trials", "front", "overlap",
        "evaluation", "reliability_before", "reliability_after", "classes", "forecast", "actual",
    }
)  # fmt: skip


def slices_section(slices: SliceSummary) -> Section:
    """How fast the slices of a run were, and where the time went."""
    blocks: list[Block] = [_slice_figure(slices)]
    if slices.seconds:
        blocks.append(_stage_figure(slices.seconds))
    blocks.append(_slowest(slices))
    read = f", {size(slices.bytes_read)} read" if slices.bytes_read else ""
    return Section(
        key="slices",
        title="Slices",
        lead=f"{count(slices.slices)} slices, {count(slices.rows)} rows, {count(slices.rejects)} rejected{read};"
        f" {duration(slices.under_way_s)} under way.",
        blocks=blocks,
    )


def forecast_section(forecast: Mapping[str, Any], actual: Mapping[str, Any] | None) -> Section:
    """What a dry run said, beside what came."""
    rows = []
    for key, name in _FORECAST_ROWS.items():
        said, came = forecast.get(key), (actual or {}).get(key)
        if said is not None:
            ratio = f"{came / said:.2f}" if came is not None and said else "-"
            rows.append([name, f"{said:,.4g}", "-" if came is None else f"{came:,.4g}", ratio])
    said, came = (one.get("cost", {}).get("total") for one in (forecast, actual or {}))
    if said:
        rows.append(
            [
                "cost",
                f"{said:.4g}",
                "-" if came is None else f"{came:.4g}",
                "-" if came is None else f"{came / said:.2f}",
            ]
        )
    sampled = forecast.get("sampled_images")
    table = text_table(
        ["what*", "forecast", "came", "came / forecast"],
        rows,
        key="forecast",
        title="Forecast against truth",
        data={"forecast": forecast, "actual": actual},
        caption=f"Forecast from {sampled:,} images." if sampled else "",
    )
    return Section(key="forecast", title="Forecast", blocks=[table])


def lineage_section(lineage: Sequence[LineageLink]) -> Section:
    """Results, model, training, data, code."""
    links = [
        Link(title=link.title, name=link.name, facts=list(link.facts.items()), gap=link.gap)
        for link in lineage
    ]
    return Section(
        key="lineage",
        title="Lineage",
        lead="What each thing was made of, by the digests that prove it.",
        blocks=[
            Chain(
                key="lineage",
                title="From the result back",
                links=links,
                data=[link.model_dump() for link in lineage],
            )
        ],
    )


def records_section(run: RunDescription, report: Mapping[str, Any]) -> Section:
    """The run's own records: state, settings, environment."""
    facts = [
        ("run", run.run),
        ("command", f"convoy {run.verb}"),
        ("state", run.state.value + (f", held by {run.held_by}" if run.held_by else "")),
        ("begun", run.opened_utc or "unknown"),
        ("where", run.uri),
    ]
    if run.inputs is not None:
        facts.append(("rows done", f"{count(run.done or 0)} of {count(run.inputs)}"))
    facts += [(f"output {name}", uri) for name, uri in islice(run.outputs.items(), _MOST_OUTPUTS)]
    if len(run.outputs) > _MOST_OUTPUTS:
        facts.append(("further outputs", count(len(run.outputs) - _MOST_OUTPUTS)))
    notes = report.get("notes")
    results = {name: value for name, value in report.items() if name not in _LONG}
    return Section(
        key="records",
        title="Records",
        blocks=[
            Facts(key="run", title="The run", rows=facts, data=run.model_dump(mode="json")),
            *([_note_table(notes)] if notes else ()),
            Facts(title="Environment", rows=list(run.versions.items())),
            Code(title="Config, as resolved", text=write_settings(run.config)),
            *(
                [Code(title="Settings that the run decided", text=write_settings(run.settings))]
                if run.settings
                else ()
            ),
            Code(title="Identity: what a resumed run must share", text=write_settings(run.identity)),
            *(
                [Code(title="Results, without the long lists", text=write_settings(results))]
                if results
                else ()
            ),
        ],
    )


def model_section(model: ModelDescription) -> Section:
    """What a bundle is, and which aliases named it when."""
    rows = [
        ("model", model.model),
        ("aliases", ", ".join(model.aliases) or "none"),
        ("strategy", model.strategy),
        ("networks", ", ".join(model.networks)),
        ("classes", count(model.num_classes)),
        ("measured", f"top-1 {percent(model.top1)} on {model.rows}" if model.top1 is not None else "not"),
        ("where", model.uri),
    ]
    return Section(key="model", title="Model", blocks=[_model_facts(model, rows), *_history(model)])


def _model_facts(model: ModelDescription, rows: list[tuple[str, str]]) -> Facts:
    if model.crops is not None:
        rows.append(("crops", model.crops.policy.value))
    data = model.model_dump(mode="json", exclude={"history"})
    return Facts(key="model", title="In short", rows=rows, data=data)


def _history(model: ModelDescription) -> Iterator[Table]:
    if model.history:
        rows = [
            [
                entry.at_utc,
                entry.action,
                ", ".join(alias.value for alias in entry.moves),
                entry.run,
                entry.reason,
            ]
            for entry in reversed(model.history)
        ]
        yield text_table(["when*", "action*", "aliases*", "run*", "why*"], rows, title="Moves of aliases")


def _note_table(notes: Sequence[str]) -> Table:
    return text_table(["note*"], [[note] for note in notes], title="Notes")


def _slice_figure(slices: SliceSummary) -> Figure:
    end_s = max(point.started_s + point.seconds for point in slices.points)
    chart = Chart(
        Scale(0.0, max(end_s, 1e-3) * 1.02),
        Scale.around([point.images_per_s for point in slices.points], floor=0.0),
        x_label="seconds since the first slice began",
        y_label="images/s of a slice",
    )
    clean = [point for point in slices.points if not point.rejects]
    for number, (name, some) in enumerate(
        (("all rows usable", clean), ("with rejects", [point for point in slices.points if point.rejects]))
    ):
        marks = [(point.started_s, point.images_per_s, _point_title(point)) for point in some]
        if marks:
            chart.dots(marks, number, name=name, radius=3.5)
    joined = slices.points[0].slices
    return Figure(
        key="slices",
        title="Rate of slices over time",
        picture=chart.draw("Images per second of each slice, by when it began"),
        data=[point.model_dump() for point in slices.points],
        values=values_table(
            (*_SLICE_COLUMNS, "slices"),
            [[*_slice_cells(point), count(point.slices)] for point in slices.points],
        ),
        caption=f"Each mark is {joined} slices, known by the first."
        if joined > 1
        else "Each mark is a slice; workers run side by side.",
    )


def _point_title(point: SlicePoint) -> str:
    return f"{point.slice}: {point.rows} rows, {point.rejects} rejects, {point.seconds:.2f} s"


def _stage_figure(seconds: Mapping[str, float]) -> Figure:
    ranked = sorted(seconds.items(), key=lambda item: -item[1])
    return Figure(
        key="stages",
        title="Seconds by stage",
        picture=bars_by_name([(name, [value]) for name, value in ranked], ["seconds"], "Seconds by stage"),
        data=dict(ranked),
        caption="Summed over workers; stages that overlap in time are counted each.",
    )


def _slowest(slices: SliceSummary) -> Table:
    rows = [_slice_cells(point) for point in slices.slowest]
    data = [point.model_dump() for point in slices.slowest]
    return text_table(_SLICE_COLUMNS, rows, key="slowest", data=data, folded="The slowest slices")


def _slice_cells(point: SlicePoint) -> list[str]:
    return [
        point.slice,
        f"{point.started_s:.1f} s",
        duration(point.seconds),
        count(point.rows),
        count(point.rejects),
        f"{point.images_per_s:,.1f}",
    ]
