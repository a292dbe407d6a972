"""What is decoded, and how, as values. Free of torch."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from convoy.core.config import StrictModel
from convoy.vision.sniffing import ImageFormat

# Twice Image.MAX_IMAGE_PIXELS: Pillow opens nothing larger.
PILLOW_MAX_PIXELS = 178_956_970

_Channel = Annotated[int, Field(ge=0, le=255)]


class DecodeRule(StrictModel):
    """What is decoded, and how. Part of every cache key.

    Sides below `min_side_px` are rejected: images of one pixel are trackers and placeholders. Transparent
    pixels show `background_rgb`. Fixed parts of the rule: 12- and 16-bit samples keep their upper 8 bits; 32-bit and
    float samples are refused, as they have no declared white; the first frame counts; EXIF orientation is
    applied; colour profiles are ignored; a JPEG or PNG without its end marker is truncated.
    """

    # Raised when the same bytes and fields would give other pixels or another verdict. Bundles and caches remember
    # earlier ones. Up to version 3, uncompressed TIFFs whose planes are declared separate are noise at 16 bits in
    # colour, and grey ones that count from white negatives; up to 2, 12-bit grey TIFFs are almost black, and PNGs of
    # 2, 4 or 3x16 bits lack the one colour that they declare transparent; in 1, 16-bit grey TIFFs whose zero is white
    # are negatives.
    version: Literal[1, 2, 3, 4] = 4
    formats: tuple[ImageFormat, ...] = tuple(ImageFormat)
    max_pixels: int = Field(default=50_000_000, gt=0, le=PILLOW_MAX_PIXELS)
    max_bytes: int = Field(default=256 << 20, gt=0)
    min_side_px: int = Field(default=2, gt=0)
    background_rgb: tuple[_Channel, _Channel, _Channel] = (255, 255, 255)


class DecodeFlag(StrEnum):
    """What was unusual on the way to RGB, such as a conversion. A public contract, counted in reports."""

    GREY_EXPANDED = "grey_expanded"
    PALETTE_EXPANDED = "palette_expanded"
    CMYK_CONVERTED = "cmyk_converted"
    ALPHA_COMPOSED = "alpha_composed"
    SIXTEEN_BIT_SCALED = "sixteen_bit_scaled"
    FIRST_FRAME_ONLY = "first_frame_only"
    EXIF_ROTATED = "exif_rotated"
    ICC_PROFILE_IGNORED = "icc_profile_ignored"
    MISNAMED = "misnamed"
