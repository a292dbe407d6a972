"""What an inspection leaves behind: pictures, the data beside each, and what they say together."""

from __future__ import annotations

from convoy.cluster.inspection_spec import MISSING, PictureData
from convoy.core.config import StrictModel
from convoy.core.errors import DataError
from convoy.core.statistics import Interval
from convoy.pipelines.near_duplicates import NearDuplicateReport
from convoy.storage.commits import read_manifest
from convoy.storage.runs import RunFolder

# Folders of a run: pictures that slices made, and the maps, which the driver draws.
INSPECTION, MAPS = "inspection", "maps"


class InspectionFigure(StrictModel):
    """A picture (PNG) and the JSON with the figures behind it, as keys of the workspace.

    `kind` is one of the config's sections. The JSON is a `PictureData`: kind, title, caption, data.
    """

    kind: str
    name: str
    title: str
    caption: str
    picture: str
    data: str


class InspectionReport(StrictModel):
    """What was looked at and drawn; `top1` is of the sample's labelled images that the model has a class for.

    Each class counts in it by its share of the splits, of which the sample says so much at 95 %.
    `samples` = `results` + `rejects`. They and `top1` are of the `splits`: images of others that were named are shown
    and not counted. `notes` say what could not be shown, and why. `folder` is the pictures' URI.
    """

    run: str
    model: str
    model_digest: str
    dataset: str
    splits: list[str]
    samples: int
    results: int
    rejects: int
    top1: float | None
    top1_interval: Interval | None = None
    neighbour_agreement: float | None
    stages: list[str]
    near_duplicates: NearDuplicateReport | None
    figures: list[InspectionFigure]
    notes: list[str]
    folder: str
    within_error_budget: bool


def read_figures(folder: RunFolder) -> tuple[list[InspectionFigure], list[str]]:
    """The pictures of a published run's slices, by what is written beside each; and why others show nothing."""
    manifest, run = read_manifest(folder), folder.record()
    if manifest is None or run is None:
        raise DataError("the inspection is not published yet", where=folder.prefix, next_step="run it again")
    figures, notes = [], []
    for record in manifest.slices:
        described = PictureData.model_validate_json(folder.store.get(record.parts["json"].key).data)
        if MISSING in described.data:
            notes.append(f"{described.title}: {described.data[MISSING]}")
            continue
        figures.append(
            InspectionFigure(
                kind=described.kind,
                name=run.outputs_of(record.slice)[0],
                title=described.title,
                caption=described.caption,
                picture=record.parts["png"].key,
                data=record.parts["json"].key,
            )
        )
    return figures, notes
