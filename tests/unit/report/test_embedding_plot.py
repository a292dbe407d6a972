from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from convoy.pipelines.embedding_maps import EmbeddingMap, MapColour, MapMethod, MapPoint
from convoy.report.embedding_plot import draw_embedding_map


def made_map(num_classes: int, *, wrong: int = 3) -> EmbeddingMap:
    """Points on a circle; the first ones are wrong, the last one has no label."""
    classes = ["_under", "$x$ & <b>", *(f"class {index}" for index in range(num_classes))][:num_classes]
    points = [
        MapPoint(
            sample_id=str(index),
            x=float(np.cos(index)),
            y=float(np.sin(index)),
            label=None if index == 59 else classes[index % num_classes],
            predicted=classes[0],
            correct=None if index == 59 else index >= wrong,
        )
        for index in range(60)
    ]
    return EmbeddingMap(
        method=MapMethod.PCA,
        tap="pooled",
        classes=classes,
        explained=(0.5, 0.25),
        neighbour_agreement=0.5,
        points=points,
    )


def colours(png: bytes) -> set[tuple[int, int, int]]:
    with Image.open(io.BytesIO(png)) as picture:
        assert (picture.format, picture.size) == ("PNG", (900, 700))
        found = picture.convert("RGB").getcolors(1 << 20)
        assert found is not None
        return {colour for count, colour in found if count > 20}


@pytest.mark.parametrize("num_classes", [1, 2, 12, 50])
@pytest.mark.parametrize("colour", list(MapColour))
def test_every_map_has_its_picture_whatever_the_names(num_classes: int, colour: MapColour) -> None:
    assert len(colours(draw_embedding_map(made_map(num_classes), colour))) > 2


def test_labels_have_colours_of_their_own() -> None:
    few, many = (colours(draw_embedding_map(made_map(number), MapColour.LABEL)) for number in (2, 9))
    assert len(many) > len(few)


def test_errors_are_seen() -> None:
    none, some = (draw_embedding_map(made_map(2, wrong=wrong), MapColour.ERROR) for wrong in (0, 30))
    assert colours(some) > colours(none) or colours(some) - colours(none)
    assert draw_embedding_map(made_map(2, wrong=30), MapColour.LABEL) == draw_embedding_map(
        made_map(2, wrong=0), MapColour.LABEL
    )
