from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image

from convoy.vision.contact_sheet import cell_origin
from convoy.vision.inspection_pictures import (
    enlarged,
    grid_png,
    heat_colours,
    heat_over,
    sheet_png,
    signed_colours,
)


def opened(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture)


def test_heat_goes_from_dark_to_yellow() -> None:
    colours_BCHW = heat_colours(torch.tensor([[[0.0, 0.5, 1.0]]]))
    assert colours_BCHW[0, :, 0].T.tolist() == [[68, 1, 84], [33, 144, 141], [253, 231, 37]]
    brightness = heat_colours(torch.linspace(0, 1, 50)[None, None])[0].float().mean(dim=0)
    assert (brightness.diff() > -3).all()


def test_where_there_is_no_heat_the_image_stays() -> None:
    images_BCHW = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    heat_BHW = torch.zeros(2, 4, 4)
    assert torch.equal(heat_over(images_BCHW, heat_BHW), images_BCHW)
    heat_BHW[0, 1, 2] = 1
    changed = (heat_over(images_BCHW, heat_BHW) != images_BCHW).any(dim=1)
    assert changed.nonzero().tolist() == [[0, 1, 2]]


def test_grey_is_zero_and_one_channel_is_grey() -> None:
    colours_BCHW = signed_colours(torch.tensor([-1.0, 0.0, 1.0]).view(1, 1, 1, 3))
    assert colours_BCHW[0, :, 0].T.tolist() == [[0] * 3, [128] * 3, [255] * 3]


def test_enlarging_repeats_pixels() -> None:
    images_BCHW = torch.tensor([[[1, 2], [3, 4]]], dtype=torch.uint8).expand(1, 3, 2, 2)
    assert enlarged(images_BCHW, 4)[0, 0].tolist() == [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]


def test_short_rows_of_a_sheet_end_in_white() -> None:
    black = torch.zeros(2, 3, 96, 96, dtype=torch.uint8)
    sheet = opened(sheet_png([("full", black), ("short", black[:1])], ["a", "b"]))
    left_px, top_px = cell_origin(0, 1, 96)
    assert not sheet[top_px + 5, left_px + 5].any()
    left_px, top_px = cell_origin(1, 1, 96)
    assert (sheet[top_px + 5, left_px + 5] == 255).all()


def test_a_grid_has_all_its_images() -> None:
    images_BCHW = torch.arange(5, dtype=torch.uint8).mul(50).view(5, 1, 1, 1).expand(5, 3, 96, 96)
    sheet = opened(grid_png(images_BCHW, [str(index) for index in range(5)]))
    shades = []
    for index in range(5):
        left_px, top_px = cell_origin(index // 3, index % 3, 96)
        shades.append(int(sheet[top_px + 5, left_px + 5, 0]))
    assert shades == [0, 50, 100, 150, 200]
