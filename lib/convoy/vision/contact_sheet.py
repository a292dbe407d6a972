"""Contact sheets: rows of images with a name in front, columns with a title above, as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

_NAME_WIDTH_PX = 160
_TITLE_HEIGHT_PX = 28
_GAP_PX = 4
_FONT_PX = 14
# Images of CIFAR's size are enlarged, pixel by pixel, until they can be looked at.
_MIN_CELL_PX = 96
_BACKGROUND, _INK = (255, 255, 255), (30, 30, 30)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SheetRow:
    """A name, and its images: uint8 of shape (columns, 3, side, side)."""

    name: str
    images_BCHW: torch.Tensor


def draw_contact_sheet(rows: Sequence[SheetRow], titles: Sequence[str]) -> Image.Image:
    """The sheet, in RGB. All rows have as many images as there are titles, all of one size."""
    cell_px = _cell_px(rows[0].images_BCHW.shape[-1])
    width_px, height_px = cell_origin(len(rows), len(titles), cell_px)
    sheet = Image.new("RGB", (width_px, height_px), _BACKGROUND)
    draw, font = ImageDraw.Draw(sheet), _font()
    for column, title in enumerate(titles):
        left_px, top_px = cell_origin(0, column, cell_px)
        text = _fitted(title, cell_px, font)
        draw.text((left_px, top_px - _GAP_PX), text, _INK, font, anchor="ls")
    for index, row in enumerate(rows):
        _, top_px = cell_origin(index, 0, cell_px)
        text = _fitted(row.name, _NAME_WIDTH_PX - _GAP_PX, font)
        draw.text((_GAP_PX, top_px + cell_px // 2), text, _INK, font, anchor="lm")
        for column, image_CHW in enumerate(row.images_BCHW):
            image = Image.fromarray(image_CHW.permute(1, 2, 0).contiguous().numpy())
            cell = image.resize((cell_px, cell_px), Image.Resampling.NEAREST)
            sheet.paste(cell, cell_origin(index, column, cell_px))
    return sheet


def cell_origin(row: int, column: int, cell_px: int) -> tuple[int, int]:
    """Where the upper left corner of a cell is, as (left, top) in pixels of the sheet."""
    step_px = cell_px + _GAP_PX
    return _NAME_WIDTH_PX + column * step_px, _TITLE_HEIGHT_PX + row * step_px


def _font() -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings: Pillow's own font has not even the letters of western Europe."""
    from matplotlib import get_data_path  # noqa: PLC0415 (only for whoever draws)

    return ImageFont.truetype(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), _FONT_PX)


def _cell_px(side_px: int) -> int:
    """The smallest multiple of the images' side that can be looked at."""
    return side_px * -(-_MIN_CELL_PX // side_px)


def _fitted(text: str, width_px: int, font: ImageFont.FreeTypeFont) -> str:
    """The text, cut with an ellipsis where it is too wide."""
    if font.getlength(text) <= width_px:
        return text
    while text and font.getlength(text + "…") > width_px:
        text = text[:-1]
    return text + "…"
