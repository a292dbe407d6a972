"""`convoy report --index`: what a workspace holds, and which pages of it lie beside the index."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from convoy.core.config import StrictModel
from convoy.core.errors import OF_ONE_FILE, ConvoyError
from convoy.core.fingerprints import digest
from convoy.core.progress import Progress
from convoy.pipelines.model_listing import ListedModel, list_models
from convoy.pipelines.report_page import PageDrawer, version_of_model, version_of_run, write_page
from convoy.pipelines.report_target import TargetKind
from convoy.pipelines.report_writing import write_html
from convoy.pipelines.runs_list import ListedRun, list_runs
from convoy.pipelines.runs_state import RunState
from convoy.pipelines.workspace import workspace_store
from convoy.storage.datasets import list_datasets, open_dataset
from convoy.storage.documents import read_json
from convoy.storage.object_store import ObjectStore
from convoy.storage.runs import RunFolder

# More rows than a page can be read with; the newest runs are shown, and the first models by name.
MAX_RUNS, MAX_MODELS = 1000, 1000
_MAX_PAGES = 5000
# Pages of evaluations take seconds and megabytes each: one call does not write thousands of them.
_MAX_WRITTEN = 100
_HEAD_BYTES = 4096
_META = re.compile(r'<meta name="convoy-(target|workspace|version)" content="([^"]*)">')
_THREADS = 8
# What an index is about.
INDEX = "index"


class IndexedDataset(StrictModel):
    """The current version of a dataset."""

    name: str
    fingerprint: str
    samples: int
    classes: int
    splits: dict[str, int]
    source: str
    frozen_utc: str


class IndexedRun(ListedRun):
    """A run, and what its report says it reached; `name` is that of the model or job, where it has one."""

    name: str
    top1: float | None


class IndexData(StrictModel):
    """A workspace, newest runs first, models by name. `pages` maps targets to the names of files beside the index.

    `num_runs` and `num_models` are all that there are; the lists hold 1000 each at most.
    """

    workspace: str
    datasets: list[IndexedDataset]
    runs: list[IndexedRun]
    num_runs: int
    models: list[ListedModel]
    num_models: int
    pages: dict[str, str]
    missing: list[str]


class IndexReport(StrictModel):
    """Where the index is, and what it lists; `pages` were found beside it."""

    output: str
    size_bytes: int
    datasets: int
    runs: int
    models: int
    pages: int
    notes: list[str]


IndexDrawer = Callable[[IndexData], bytes]


def write_index(
    workspace: str | None,
    output: str,
    draw: IndexDrawer,
    *,
    progress: Progress,
    draw_page: PageDrawer | None = None,
) -> IndexReport:
    """Draw the index of a workspace and write it to a local path; ConfigError where it cannot be written.

    With `draw_page` datasets, models and finished runs that have no page beside the index, or one of another version,
    get one first, 100 a call.
    """
    store = workspace_store(workspace)
    progress.stage("looking through the workspace")
    folder = Path(output).absolute().parent
    index = read_index(store, folder)
    if draw_page is not None:
        notes = _write_pages(store.root_uri, index, folder, draw_page, progress=progress)
        pages = find_pages(folder, store.root_uri)
        index = index.model_copy(update={"pages": pages, "missing": [*index.missing, *notes]})
    return IndexReport(
        output=output,
        size_bytes=write_html(output, draw(index)),
        datasets=len(index.datasets),
        runs=index.num_runs,
        models=index.num_models,
        pages=len(index.pages),
        notes=index.missing,
    )


def read_index(store: ObjectStore, folder: Path) -> IndexData:
    """What a workspace holds, and the pages in a local folder. What cannot be read is said, and left out."""
    missing: list[str] = []
    listed = list_runs(store)
    runs = listed.runs
    missing += [f"run {one.run}: {one.what} [{one.where}]" for one in listed.unreadable]
    with ThreadPoolExecutor(_THREADS) as pool:
        shown = list(pool.map(lambda run: _indexed_run(store, run, missing), runs[:MAX_RUNS]))
    models: list[ListedModel] = []
    try:
        found = list_models(store.root_uri)
        models = found.models
        missing += [f"model {one.model}: {one.what} [{one.where}]" for one in found.unreadable]
    except ConvoyError as error:
        missing.append(f"the models: {error.what}")
    return IndexData(
        workspace=store.root_uri,
        datasets=_datasets(store, missing),
        runs=shown,
        num_runs=len(runs),
        models=models[:MAX_MODELS],
        num_models=len(models),
        pages=find_pages(folder, store.root_uri),
        missing=missing,
    )


def _write_pages(
    workspace: str, index: IndexData, folder: Path, draw: PageDrawer, *, progress: Progress
) -> list[str]:
    """Write the pages that are missing; what could not be written, and why."""
    versions = {
        **{f"{TargetKind.DATASET}:{one.name}": one.fingerprint for one in index.datasets},
        **{f"{TargetKind.MODEL}:{one.model}": version_of_model(one.aliases) for one in index.models},
        **{
            f"{TargetKind.RUN}:{one.run}": version_of_run(one.state)
            for one in index.runs
            if one.state is RunState.FINISHED
        },
    }
    found = {page.target: page for page in _pages(folder, workspace)}
    lacking = [
        target
        for target, version in versions.items()
        if target not in found or found[target].version != version
    ]
    notes = []
    for target in lacking[:_MAX_WRITTEN]:
        try:
            name = found[target].file if target in found else _page_name(target)
            write_page(workspace, target, str(folder / name), draw, progress=progress)
        except (ConvoyError, ValidationError, OSError) as error:
            why = error.what if isinstance(error, ConvoyError) else str(error)
            notes.append(f"the page of {target}: {why}")
    if len(lacking) > _MAX_WRITTEN:
        notes.append(
            f"{len(lacking) - _MAX_WRITTEN} further pages: the same command again writes {_MAX_WRITTEN} more"
        )
    return notes


def _page_name(target: str) -> str:
    """A file name that every file system takes, other for each target."""
    return f"{re.sub('[^A-Za-z0-9._-]', '-', target)[:100]}-{digest(target)[:8]}.html"


class _FoundPage(NamedTuple):
    """A page in a local folder: what it is about, in which version, and its file's name."""

    target: str
    version: str
    file: str


def find_pages(folder: Path, workspace: str) -> dict[str, str]:
    """The pages of a workspace in a local folder: the names of their files by what they are about."""
    return {page.target: page.file for page in _pages(folder, workspace)}


def _pages(folder: Path, workspace: str) -> Iterator[_FoundPage]:
    """Of pages that do not name their workspace, as older ones, those of runs count: other ones have other runs."""
    for path in sorted(folder.glob("*.html"))[:_MAX_PAGES]:
        try:
            with path.open("rb") as file:
                head = file.read(_HEAD_BYTES).decode(errors="replace")
        except OSError:
            continue
        meta = {name: html.unescape(content) for name, content in _META.findall(head)}
        target, named = meta.get("target", INDEX), meta.get("workspace")
        is_ours = target.startswith(f"{TargetKind.RUN}:") if named is None else named == workspace
        if is_ours and target != INDEX:
            yield _FoundPage(target, meta.get("version", ""), path.name)


def _indexed_run(store: ObjectStore, run: ListedRun, missing: list[str]) -> IndexedRun:
    folder = RunFolder(store, run.run)
    record = folder.record()
    name = "" if record is None else record.config.get("name")
    report: dict[str, Any] = {}
    if run.state is RunState.FINISHED:
        try:
            report = read_json(store, folder.key("report.json")) or {}
        except OF_ONE_FILE as error:
            missing.append(f"the report of run {run.run}: {error.what} [{error.where}]")
    top1 = report.get("top1", (report.get("measured") or {}).get("top1"))
    return IndexedRun(**run.model_dump(), name=name or "", top1=top1)


def _datasets(store: ObjectStore, missing: list[str]) -> list[IndexedDataset]:
    found = []
    for name in list_datasets(store):
        try:
            header = open_dataset(store, name).header
            pointer = read_json(store, f"datasets/{name}/current.json") or {}
        except ConvoyError as error:
            missing.append(f"{TargetKind.DATASET} {name}: {error.what}")
            continue
        found.append(
            IndexedDataset(
                name=name,
                fingerprint=header.fingerprint,
                samples=header.num_samples,
                classes=len(header.classes),
                splits={split.value: counts.num_samples for split, counts in header.counts.items()},
                source=header.source,
                frozen_utc=pointer.get("frozen_utc", ""),
            )
        )
    return found
