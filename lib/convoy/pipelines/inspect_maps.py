"""The maps of an inspection: points with what is known of them as JSON, and a picture for each way to colour them."""

from __future__ import annotations

import json
from collections.abc import Callable

from convoy.cluster.inspection_spec import PictureData
from convoy.pipelines.embedding_maps import EmbeddingMap, MapColour, MapMethod, MapPoint, place_points
from convoy.pipelines.inspect_config import EmbeddingConfig, Section
from convoy.pipelines.inspect_findings import Findings
from convoy.pipelines.inspect_report import MAPS, InspectionFigure
from convoy.storage.runs import RunFolder

MapDrawer = Callable[[EmbeddingMap, MapColour], bytes]

_COLOURED_BY = {MapColour.LABEL: "label", MapColour.ERROR: "whether the model is right"}


def write_maps(
    folder: RunFolder, found: Findings, config: EmbeddingConfig, draw: MapDrawer
) -> list[InspectionFigure]:
    """Draw and write the map of each method, once for each colour. The findings must have an embedding."""
    return [
        figure
        for method in config.methods
        for figure in _write_map(folder, _map(found, method, config.seed), draw)
    ]


def _write_map(folder: RunFolder, placed: EmbeddingMap, draw: MapDrawer) -> list[InspectionFigure]:
    figures = []
    for colour, words in _COLOURED_BY.items():
        name = f"{placed.method.value}-{colour.value}"
        title = f"The sample in feature space, by {words}"
        caption = f"{placed.method.value.upper()} of the features at {placed.tap}; a point is an image."
        described = PictureData(
            kind=Section.EMBEDDING, title=title, caption=caption, data=placed.model_dump(mode="json")
        )
        keys = {kind: folder.key(f"{MAPS}/{name}.{kind}") for kind in ("png", "json")}
        folder.store.put(keys["png"], draw(placed, colour))
        folder.store.put(keys["json"], json.dumps(described.model_dump(mode="json"), indent=1).encode())
        figures.append(
            InspectionFigure(
                kind=Section.EMBEDDING,
                name=name,
                title=title,
                caption=caption,
                picture=keys["png"],
                data=keys["json"],
            )
        )
    return figures


def _map(found: Findings, method: MapMethod, seed: int) -> EmbeddingMap:
    sample = found.sample
    assert found.embedding_ND is not None
    points_N2, explained = place_points(found.embedding_ND, method, seed)
    predicted_N, wrong_N = sample.predicted_N.tolist(), sample.wrong_N.tolist()
    points = [
        MapPoint(
            sample_id=sample_id,
            x=x,
            y=y,
            label=sample.classes[label] if label >= 0 else None,
            predicted=sample.classes[predicted],
            correct=not wrong if label >= 0 else None,
        )
        for sample_id, (x, y), label, predicted, wrong in zip(
            sample.sample_ids(),
            points_N2.tolist(),
            sample.labels_N.tolist(),
            predicted_N,
            wrong_N,
            strict=True,
        )
    ]
    return EmbeddingMap(
        method=method,
        tap=found.embedding_tap,
        classes=list(sample.classes),
        explained=explained,
        neighbour_agreement=found.neighbour_agreement,
        points=points,
    )
