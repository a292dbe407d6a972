"""Pieces of an inspection as pictures, with the figures behind them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from convoy.cluster.inspection_spec import MISSING, Piece, PieceKind
from convoy.cluster.prepared_batches import SliceImages
from convoy.core.errors import ConfigError
from convoy.vision.inspection import InspectedNetwork
from convoy.vision.inspection_cam import grad_cam
from convoy.vision.inspection_maps import feature_maps, first_filters
from convoy.vision.inspection_maximisation import maximise
from convoy.vision.inspection_options import MaximisationOptions
from convoy.vision.inspection_pictures import (
    enlarged,
    grid_png,
    heat_colours,
    heat_over,
    sheet_png,
    signed_colours,
)
from convoy.vision.stages import DepthAxis

# Maps of a few pixels are enlarged to this at least.
_MIN_SIDE_PX = 96


class Picture(NamedTuple):
    """A picture as PNG, and the figures behind it as a JSON object."""

    png: bytes
    data: dict[str, object]


class PieceDrawer:
    """Draws pieces of one network; `raw` is the module whose first layer is shown."""

    def __init__(
        self, raw: nn.Module, axis: DepthAxis, network: InspectedNetwork, options: MaximisationOptions
    ) -> None:
        self._raw, self._axis, self._network, self._options = raw, axis, network, options

    def draw(self, piece: Piece, images: SliceImages, pixels_BCHW: Tensor) -> Picture:
        """The picture of a piece. `pixels_BCHW` are the images of its rows, white where there is none."""
        match piece.kind:
            case PieceKind.FILTERS:
                return self._filters()
            case PieceKind.CLASSES | PieceKind.CHANNELS:
                return self._units(piece)
            case PieceKind.CAMS:
                return self._cams(piece, images, pixels_BCHW)
            case PieceKind.FEATURE_MAPS:
                return self._maps(piece, pixels_BCHW)
            case PieceKind.NEIGHBOURS | PieceKind.NEAR_DUPLICATES:
                return _sheet(piece, pixels_BCHW)

    def _filters(self) -> Picture:
        try:
            filters = first_filters(self._raw, self._axis)
        except ConfigError as error:
            # No reason to draw nothing else; the driver makes a note of it.
            white_BCHW = torch.full((1, 3, _MIN_SIDE_PX, _MIN_SIDE_PX), 255, dtype=torch.uint8)
            return Picture(sheet_png([("", white_BCHW)], [""]), {MISSING: error.what})
        names = [str(index) for index in range(len(filters.norms_F))]
        data: dict[str, object] = {"module": filters.module, "norms": filters.norms_F}
        return Picture(grid_png(signed_colours(filters.images_FCHW), names), data)

    def _units(self, piece: Piece) -> Picture:
        made = maximise(self._network, piece.units, self._options)
        units = [
            {"name": name, **unit.model_dump(mode="json"), "start": start, "end": end}
            for name, unit, start, end in zip(
                piece.unit_names, piece.units, made.start_B, made.end_B, strict=True
            )
        ]
        png = sheet_png([(piece.stages[0] if piece.stages else "", made.images_BCHW)], piece.unit_names)
        return Picture(png, {"units": units, "options": self._options.model_dump(mode="json")})

    def _cams(self, piece: Piece, images: SliceImages, pixels_BCHW: Tensor) -> Picture:
        looks = [look for look in piece.looks if images.usable_N[look.row]]
        seen_BCHW = pixels_BCHW[[look.row for look in looks]]
        heats: dict[str, Tensor] = {}
        if looks:
            heats = grad_cam(self._network, seen_BCHW, [look.class_index for look in looks], piece.stages)
        overlays = [heat_over(seen_BCHW, heat_BHW) for heat_BHW in heats.values()]
        lines = [
            (look.name, torch.stack([seen_BCHW[place], *(overlay[place] for overlay in overlays)]))
            for place, look in enumerate(looks)
        ]
        ids = images.rows["sample_id"].to_pylist()
        described = [
            {
                **look.model_dump(mode="json"),
                "sample_id": ids[look.row],
                "stages": {stage: _hottest(heat_BHW[place]) for stage, heat_BHW in heats.items()},
            }
            for place, look in enumerate(looks)
        ]
        titles = ["image", *piece.stages]
        # No image could be read: the sheet is white.
        return Picture(sheet_png(lines or [("", pixels_BCHW[:1])], titles), {"looks": described})

    def _maps(self, piece: Piece, pixels_BCHW: Tensor) -> Picture:
        (by_stage,) = feature_maps(self._network, pixels_BCHW, piece.stages, piece.num_channels)
        side_px = max(pixels_BCHW.shape[-1], _MIN_SIDE_PX)
        image_BCHW = enlarged(pixels_BCHW, side_px)
        lines = [
            (stage, torch.cat([image_BCHW, enlarged(heat_colours(maps.maps_MHW), side_px)]))
            for stage, maps in by_stage.items()
        ]
        titles = ["image", *(f"no. {rank + 1}" for rank in range(piece.num_channels))]
        data: dict[str, object] = {
            "sample_id": piece.lines[0].sample_ids[0],
            "stages": {
                stage: {"channels": maps.channels, "means": maps.means} for stage, maps in by_stage.items()
            },
        }
        return Picture(sheet_png(lines, titles), data)


def _sheet(piece: Piece, pixels_BCHW: Tensor) -> Picture:
    """The rows of a piece, line after line."""
    lines, start = [], 0
    for line in piece.lines:
        lines.append((line.name, pixels_BCHW[start : start + len(line.sample_ids)]))
        start += len(line.sample_ids)
    data: dict[str, object] = {"lines": [line.model_dump(mode="json") for line in piece.lines]}
    return Picture(sheet_png(lines, piece.columns), data)


def _hottest(heat_HW: Tensor) -> dict[str, object]:
    """Where the heat is largest, as (x, y) in 0..1 of the image, and the share of the image above half of it."""
    place = int(heat_HW.argmax())
    height, width = heat_HW.shape
    return {
        "hottest_xy": [(place % width + 0.5) / width, (place // width + 0.5) / height],
        "share_above_half": float((heat_HW > 0.5).float().mean()),
        "is_empty": not bool(heat_HW.any()),
    }
