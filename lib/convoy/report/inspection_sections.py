"""Sections about a look inside a model: what filters, channels and classes look for, and where images lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from markupsafe import Markup

from convoy.pipelines.inspect_report import InspectionReport
from convoy.pipelines.near_duplicates import NearDuplicateReport
from convoy.pipelines.report_inspection import InspectionPicture
from convoy.report.blocks import Block, Facts, Figure, Notes, Section, Tile
from convoy.report.duplicate_blocks import alike_groups
from convoy.report.html import clean, image_link
from convoy.report.words import count, percent, span

_TITLES = {
    "filters": "First-layer filters",
    "classes": "What classes look for",
    "channels": "What channels look for",
    "cams": "Where the model looks",
    "feature_maps": "Feature maps by depth",
    "neighbours": "Nearest neighbours",
    "embedding": "Map of the embedding",
    "near_duplicates": "Near duplicates",
}


def inspection_tiles(report: InspectionReport) -> list[Tile]:
    """What was looked at."""
    tiles = [Tile(count(report.results), f"images of {', '.join(report.splits)}")]
    if report.top1 is not None:
        limits = "" if report.top1_interval is None else f", 95 %: {span(report.top1_interval)}"
        tiles.append(Tile(percent(report.top1), f"top-1, classes by their shares{limits}"))
    if report.neighbour_agreement is not None:
        tiles.append(Tile(percent(report.neighbour_agreement), "of the nearest neighbours share the label"))
    return tiles


def inspection_sections(report: InspectionReport, pictures: Sequence[InspectionPicture]) -> Iterator[Section]:
    """A section for each kind of picture."""
    for kind, group in groupby(pictures, key=lambda one: one.kind):
        blocks: list[Block] = [_figure(one) for one in group]
        if kind == "near_duplicates":
            blocks += _duplicates(report)
        yield Section(
            key=f"inspection-{kind.replace('_', '-')}", title=_TITLES.get(kind, kind), blocks=blocks
        )
    if report.near_duplicates is not None and all(one.kind != "near_duplicates" for one in pictures):
        yield Section(
            key="near-duplicates", title=_TITLES["near_duplicates"], blocks=list(_duplicates(report))
        )
    if report.notes:
        yield Section(key="inspection-notes", title="Not drawn", blocks=[Notes(texts=report.notes)])


def _figure(one: InspectionPicture) -> Figure:
    picture = Markup('<img class="wide" src="{}" alt="{}">').format(
        image_link(one.image, one.media_type), clean(one.title)
    )
    missing = Markup("<p>{}</p>").format(clean(one.missing))
    return Figure(
        key=f"inspection-{one.name}",
        title=one.title,
        picture=picture if one.image else missing,
        data=one.data,
        caption=one.caption,
        is_wide=True,
    )


def _duplicates(report: InspectionReport) -> Iterator[Block]:
    found = report.near_duplicates
    if found is None:
        return
    rows = [
        ("compared", count(found.compared)),
        ("groups that show one picture", count(found.groups)),
        ("images in them", count(found.samples)),
        ("groups across splits", _across_splits(found)),
        ("groups whose labels differ", count(found.label_conflicts)),
        ("similarity from", f"{found.threshold:.3f}"),
    ]
    yield Facts(key="near-duplicates", title="In numbers", rows=rows, data=found.model_dump(mode="json"))
    yield from alike_groups(found)


def _across_splits(found: NearDuplicateReport) -> str:
    if len(found.splits) == 1:
        return f"not looked for among images of {found.splits[0]} alone; near_duplicates.scope=dataset has all of them"
    return count(found.across_splits)
