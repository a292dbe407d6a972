from __future__ import annotations

import numpy as np
import pytest
import torch

from convoy.vision.contact_sheet import SheetRow, cell_origin, draw_contact_sheet
from image_files import photo


def rows(number: int, columns: int, side_px: int, name: str = "cat") -> list[SheetRow]:
    return [
        SheetRow(
            name=name,
            images_BCHW=torch.stack(
                [
                    torch.from_numpy(photo(side_px, side_px, 10 * row + column)).permute(2, 0, 1)
                    for column in range(columns)
                ]
            ),
        )
        for row in range(number)
    ]


def test_every_cell_shows_its_image() -> None:
    sheet_rows = rows(3, 2, 120)
    sheet = np.asarray(draw_contact_sheet(sheet_rows, ["evaluation", "draw 1"]))
    for row, sheet_row in enumerate(sheet_rows):
        for column, image_CHW in enumerate(sheet_row.images_BCHW):
            left_px, top_px = cell_origin(row, column, 120)
            cell = sheet[top_px : top_px + 120, left_px : left_px + 120]
            assert np.array_equal(cell, image_CHW.permute(1, 2, 0).numpy())


def test_small_images_are_enlarged_pixel_by_pixel() -> None:
    sheet_rows = rows(1, 1, 32)
    sheet = np.asarray(draw_contact_sheet(sheet_rows, ["evaluation"]))
    left_px, top_px = cell_origin(0, 0, 96)
    cell = sheet[top_px : top_px + 96, left_px : left_px + 96]
    assert np.array_equal(cell[1::3, 1::3], sheet_rows[0].images_BCHW[0].permute(1, 2, 0).numpy())
    assert np.array_equal(cell[::3, ::3], cell[2::3, 2::3])


@pytest.mark.parametrize("letter", "éößñЖΩ")
def test_letters_of_other_languages_are_drawn(letter: str) -> None:
    """A font draws the same box for whatever it does not have."""
    drawn, missing = (
        np.asarray(draw_contact_sheet(rows(1, 1, 120, name), [""])) for name in (letter, "\uffff")
    )
    assert not np.array_equal(drawn, missing)


def test_names_and_titles_are_written_beside_the_cells_and_never_over_them() -> None:
    named, unnamed = (
        np.asarray(draw_contact_sheet(rows(1, 2, 120, name), titles))
        for name, titles in (
            ("a very long name of a class that never ends", ["evaluation", "draw 1"]),
            ("", ["", ""]),
        )
    )
    changed = (named != unnamed).any(axis=-1)
    left_px, top_px = cell_origin(0, 0, 120)
    assert changed[:, :left_px].any()
    assert changed[:top_px].any()
    assert not changed[top_px:, left_px:].any()
