"""The page of a run, a dataset or a model: which sections it has, in which order."""

from __future__ import annotations

from collections.abc import Iterator

from convoy.core.version import VERSION
from convoy.pipelines.report_page import PageData
from convoy.pipelines.report_target import TargetKind
from convoy.report.advice_sections import advice_sections, advice_tiles
from convoy.report.blocks import Notes, Page, Section, Tile
from convoy.report.data_sections import data_card_section, rejects_section, sheet_section
from convoy.report.drift_sections import retrains_section
from convoy.report.ensemble_sections import ensemble_lead, ensemble_sections, ensemble_tiles
from convoy.report.html import render_page
from convoy.report.inspection_sections import inspection_sections, inspection_tiles
from convoy.report.quality_sections import (
    committee_section,
    judged_rows,
    prediction_sections,
    quality_sections,
    quality_tiles,
)
from convoy.report.run_sections import (
    forecast_section,
    lineage_section,
    model_section,
    records_section,
    slices_section,
)
from convoy.report.subgroup_sections import subgroups_section
from convoy.report.training_sections import curves_section, trials_section
from convoy.report.words import count, moment, percent, span


def draw_page(data: PageData) -> bytes:
    """One HTML file that needs nothing else, for light and dark screens and for paper."""
    sections = [*_sections(data), *_missing(data)]
    return render_page(
        Page(
            target=data.target,
            workspace=data.workspace,
            version=data.version,
            title=_title(data),
            lead=_lead(data),
            tiles=_tiles(data),
            sections=sections,
            footer=f"Convoy {VERSION} · {data.target} · workspace {data.workspace}",
        )
    )


def _sections(data: PageData) -> Iterator[Section]:
    if data.model is not None:
        yield model_section(data.model)
    if data.advice is not None:
        yield from advice_sections(data.advice)
    if data.inspection is not None:
        yield from inspection_sections(data.inspection, data.pictures)
    if data.ensemble is not None:
        yield from ensemble_sections(data.ensemble)
    if data.trials:
        yield trials_section(data.trials)
    if data.history:
        yield curves_section(data.history)
    yield from _quality(data)
    if data.retrains:
        yield retrains_section(data.retrains)
    yield from _data(data)
    yield from _run(data)


def _quality(data: PageData) -> Iterator[Section]:
    # An ensemble's own sections say what its members and crops give.
    parts = data.committee
    if parts is not None and data.ensemble is None and (parts.members or parts.cost or parts.effect):
        yield committee_section(parts)
    if data.evaluation is not None:
        yield from quality_sections(data.evaluation, data.predictions)
    if data.predictions is not None:
        yield from prediction_sections(data.predictions, data.evaluation)
        if data.subgroups and data.predictions.top1 is not None:
            yield subgroups_section(data.subgroups, data.predictions.top1.estimate)


def _data(data: PageData) -> Iterator[Section]:
    if data.rejects is not None:
        yield rejects_section(data.rejects)
    if data.sheet is not None:
        yield sheet_section(data.sheet)
    if data.data_card is not None:
        yield data_card_section(data.data_card)


def _run(data: PageData) -> Iterator[Section]:
    if data.slices is not None:
        yield slices_section(data.slices)
    if data.run is not None and data.run.forecast:
        yield forecast_section(data.run.forecast, data.run.actual)
    if data.lineage:
        yield lineage_section(data.lineage)
    if data.run is not None:
        yield records_section(data.run, data.report)


def _missing(data: PageData) -> Iterator[Section]:
    if data.missing:
        lead = "Parts of this page that could not be read from the workspace."
        yield Section(key="missing", title="Not shown", lead=lead, blocks=[Notes(texts=data.missing)])


def _title(data: PageData) -> str:
    if data.kind is TargetKind.DATASET:
        return f"Dataset {data.name}"
    if data.run is None:
        return f"Model {data.name.partition('@')[0]}"
    name = data.run.config.get("name")
    return f"{data.run.verb.capitalize()} {name or data.run.dataset}".strip()


def _lead(data: PageData) -> str:
    if data.ensemble is not None:
        return ensemble_lead(data.ensemble)
    if data.run is not None:
        dataset = f" on dataset {data.run.dataset}" if data.run.dataset else ""
        return f"Run {data.run.run}, {data.run.state.value}{dataset}, begun {moment(data.run.opened_utc)}."
    if data.data_card is not None:
        return f"Frozen from {data.data_card.source}."
    return data.name


def _tiles(data: PageData) -> list[Tile]:
    if data.advice is not None:
        return advice_tiles(data.advice)
    if data.inspection is not None:
        return inspection_tiles(data.inspection)
    if data.ensemble is not None:
        return ensemble_tiles(data.ensemble)
    if data.evaluation is not None:
        return quality_tiles(data.evaluation)
    return [*_prediction_tiles(data), *_run_tiles(data), *_data_tiles(data)]


def _prediction_tiles(data: PageData) -> Iterator[Tile]:
    found = data.predictions
    if found is not None:
        yield Tile(count(found.rows), "rows with predictions")
        if found.top1 is not None:
            text = f"top-1 of {count(found.labelled)} {judged_rows(found)}, 95 %: {span(found.top1)}"
            yield Tile(percent(found.top1.estimate), text)
        if found.unknown:
            yield Tile(count(found.unknown), "rows with a label that the model does not know")


def _run_tiles(data: PageData) -> Iterator[Tile]:
    if data.rejects is not None:
        yield Tile(count(data.rejects.rows), "rejected rows")
    if data.slices is not None and data.slices.under_way_s:
        yield Tile(
            f"{data.slices.rows / data.slices.under_way_s:,.0f}", "images/s while slices were under way"
        )


def _data_tiles(data: PageData) -> Iterator[Tile]:
    card = data.data_card
    if card is not None and data.kind is TargetKind.DATASET:
        yield Tile(count(card.samples), "samples")
        yield Tile(count(len(card.classes)), "classes")
        if card.imbalance is not None:
            yield Tile(f"{card.imbalance:.2f}", "times as many in the largest class as in the smallest")
        if card.duplicates is not None:
            yield Tile(count(card.duplicates.samples), "images with an exact duplicate")
