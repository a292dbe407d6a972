"""Heat as colours, and grids of small pictures as PNG files."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the field's name for it)
from torch import Tensor

from convoy.vision.contact_sheet import SheetRow, draw_contact_sheet

# Nine of matplotlib's viridis (van der Walt and Smith 2015, CC0): even steps look even, in grey too.
_VIRIDIS = np.array(
    [
        (68, 1, 84),
        (71, 44, 122),
        (59, 81, 139),
        (44, 113, 142),
        (33, 144, 141),
        (39, 173, 129),
        (92, 200, 99),
        (170, 220, 50),
        (253, 231, 37),
    ],
    np.float32,
)
_SHARE_OF_HEAT = 0.55


def heat_colours(heat_BHW: Tensor) -> Tensor:
    """uint8 images_BCHW of values in 0..1, dark violet for 0 to yellow for 1."""
    places = heat_BHW.clamp(0, 1).numpy()
    anchors = np.linspace(0, 1, len(_VIRIDIS))
    channels = [np.interp(places, anchors, _VIRIDIS[:, channel]) for channel in range(3)]
    return torch.from_numpy(np.stack(channels, axis=1).round().astype(np.uint8))


def heat_over(images_BCHW: Tensor, heat_BHW: Tensor) -> Tensor:
    """uint8 images under their heat, which is the more opaque the hotter it is."""
    share_B1HW = _SHARE_OF_HEAT * heat_BHW.clamp(0, 1)[:, None]
    mixed_BCHW = (1 - share_B1HW) * images_BCHW.float() + share_B1HW * heat_colours(heat_BHW).float()
    return mixed_BCHW.round().to(torch.uint8)


def signed_colours(weights_BCHW: Tensor) -> Tensor:
    """uint8 images_BCHW of three channels for weights in -1..1; grey is 0, and one channel is shown as grey values."""
    grey_BCHW = ((weights_BCHW.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return grey_BCHW.expand(-1, 3, -1, -1) if grey_BCHW.shape[1] == 1 else grey_BCHW


def enlarged(images_BCHW: Tensor, side_px: int) -> Tensor:
    """uint8 images at another side, pixel by pixel, so that a map's own resolution can be seen."""
    return F.interpolate(images_BCHW.float(), size=(side_px, side_px), mode="nearest").to(torch.uint8)


def sheet_png(rows: Sequence[tuple[str, Tensor]], titles: Sequence[str]) -> bytes:
    """A PNG of rows of uint8 images_BCHW, with a name before each row and a title above each column.

    A row with fewer images than there are titles ends in white.
    """
    drawn = [SheetRow(name=name, images_BCHW=_filled(images_BCHW, len(titles))) for name, images_BCHW in rows]
    buffer = io.BytesIO()
    draw_contact_sheet(drawn, titles).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def grid_png(images_BCHW: Tensor, names: Sequence[str]) -> bytes:
    """A PNG of uint8 images in about as many rows as columns, each row named by its first and last image."""
    num_columns = min(math.ceil(math.sqrt(len(names))), 12)
    rows = []
    for start in range(0, len(names), num_columns):
        row = names[start : start + num_columns]
        rows.append(
            (row[0] if len(row) == 1 else f"{row[0]} … {row[-1]}", images_BCHW[start : start + len(row)])
        )
    return sheet_png(rows, [""] * num_columns)


def _filled(images_BCHW: Tensor, number: int) -> Tensor:
    missing = number - len(images_BCHW)
    white = torch.full((missing, *images_BCHW.shape[1:]), 255, dtype=torch.uint8)
    return torch.cat([images_BCHW, white]) if missing else images_BCHW
