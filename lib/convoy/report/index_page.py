"""The home page of a workspace: its datasets, runs and models, with links to the pages that lie beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from urllib.parse import quote

from convoy.pipelines.model_listing import ListedModel
from convoy.pipelines.report_index import INDEX, IndexData, IndexedDataset, IndexedRun
from convoy.report.blocks import Cell, Column, Notes, Page, Row, Section, Table, Tile
from convoy.report.html import render_page
from convoy.report.words import count, percent


def draw_index(index: IndexData) -> bytes:
    """One HTML file that needs nothing else; a name is a link where its page lies in the same folder."""
    sections = [
        Section(key="datasets", title="Datasets", blocks=[_datasets(index.datasets, index.pages)]),
        Section(key="models", title="Models", blocks=[_models(index.models, index)]),
        Section(key="runs", title="Runs", blocks=[_runs(index.runs, index)]),
    ]
    if index.missing:
        sections.append(Section(key="missing", title="Not shown", blocks=[Notes(texts=index.missing)]))
    linked = len(index.pages)
    pages = (
        f"{linked} of them have a page beside this one."
        if linked
        else "None of them has a page beside this one yet."
    )
    hint = (
        "convoy report RUN|DATASET|MODEL --out NAME.html in this folder, then the index again, adds a link;"
        " --pages beside --index writes all that are missing."
    )
    return render_page(
        Page(
            target=INDEX,
            title="Workspace",
            lead=f"{index.workspace}. {pages} {hint}",
            tiles=[
                Tile(count(len(index.datasets)), "datasets"),
                Tile(count(index.num_models), "models"),
                Tile(count(index.num_runs), "runs"),
            ],
            sections=sections,
        )
    )


def _datasets(datasets: Sequence[IndexedDataset], pages: Mapping[str, str]) -> Table:
    rows = [
        [
            _linked(one.name, f"dataset:{one.name}", pages),
            Cell(count(one.samples)),
            Cell(count(one.classes)),
            Cell(", ".join(f"{split} {count(rows)}" for split, rows in one.splits.items())),
            Cell(one.frozen_utc),
            Cell(one.source),
        ]
        for one in datasets
    ]
    columns = ["name*", "samples", "classes", "splits*", "frozen*", "source*"]
    return _table(columns, rows, key="datasets", data=[one.model_dump() for one in datasets])


def _models(models: Sequence[ListedModel], index: IndexData) -> Table:
    rows = [
        [
            _linked(one.model, f"model:{one.model}", index.pages),
            Cell(", ".join([*(["latest"] if one.is_latest else []), *one.aliases])),
            Cell(one.strategy),
            Cell(", ".join(dict.fromkeys(one.networks))),
            Cell(count(one.num_classes)),
            Cell(percent(one.top1)),
            Cell(one.rows),
        ]
        for one in models
    ]
    columns = ["model*", "names*", "strategy*", "networks*", "classes", "top-1", "measured on*"]
    caption = _of_all("first", len(models), index.num_models, order=", by name")
    return _table(columns, rows, key="models", data=[one.model_dump() for one in models], caption=caption)


def _runs(runs: Sequence[IndexedRun], index: IndexData) -> Table:
    rows = [
        [
            _linked(one.run, f"run:{one.run}", index.pages),
            Cell(one.verb),
            Cell(one.name),
            Cell(one.dataset),
            Cell(one.state.value),
            Cell("" if one.inputs is None else f"{count(one.done or 0)} of {count(one.inputs)}"),
            Cell("" if one.top1 is None else percent(one.top1)),
            Cell(one.opened_utc or ""),
        ]
        for one in runs
    ]
    columns = ["run*", "verb*", "name*", "dataset*", "state*", "rows", "top-1", "begun*"]
    data = [one.model_dump(mode="json") for one in runs]
    caption = _of_all("newest", len(runs), index.num_runs)
    return _table(columns, rows, key="runs", data=data, caption=caption)


def _linked(text: str, target: str, pages: Mapping[str, str]) -> Cell:
    file = pages.get(target)
    # A relative path in percent signs: whatever a file is called, the link stays in this folder.
    return Cell(text, href=f"./{quote(file, safe='')}" if file else "")


def _of_all(which: str, shown: int, there_are: int, *, order: str = "") -> str:
    return "" if shown == there_are else f"The {which} {count(shown)} of {count(there_are)}{order}."


def _table(
    columns: Sequence[str], rows: Sequence[Sequence[Cell]], *, key: str, data: object, caption: str = ""
) -> Table:
    return Table(
        key=key,
        title=f"{count(len(rows))} {key}",
        columns=[Column(name.rstrip("*"), is_text=name.endswith("*")) for name in columns],
        rows=[Row(tuple(cells)) for cells in rows],
        data=data,
        caption=caption,
    )
