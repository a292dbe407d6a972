"""Small JPEGs of images, for pages that people look at."""

from __future__ import annotations

import io
from dataclasses import dataclass

import torch
from PIL import Image

from convoy.vision.decode_rule import DecodeRule
from convoy.vision.decoding import decode_image

_QUALITY = 82


@dataclass(frozen=True, slots=True, kw_only=True)
class Thumbnail:
    """A JPEG without metadata, and the size of the image that it was made of."""

    jpeg: bytes
    width_px: int
    height_px: int


def make_thumbnail(data: bytes, rule: DecodeRule, *, side_px: int) -> Thumbnail:
    """The image in some bytes, with no side longer than `side_px`; smaller images keep their size.

    Raises SampleRejected as `decode_image`.
    """
    pixels_CHW = decode_image(data, rule).pixels_CHW
    _, height_px, width_px = pixels_CHW.shape
    return Thumbnail(jpeg=encode_jpeg(pixels_CHW, side_px=side_px), width_px=width_px, height_px=height_px)


def png_as_jpeg(png: bytes) -> bytes:
    """The picture of a PNG as a JPEG with its colours at full resolution, so that lettering stays legible.

    Raises OSError for bytes that are no picture.
    """
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(png)) as image:
        image.convert("RGB").save(buffer, "JPEG", quality=_QUALITY, optimize=True, subsampling=0)
    return buffer.getvalue()


def encode_jpeg(pixels_CHW: torch.Tensor, *, side_px: int) -> bytes:
    """A JPEG of uint8 RGB pixels, made smaller where a side is longer than `side_px`."""
    image = Image.fromarray(pixels_CHW.permute(1, 2, 0).contiguous().numpy())
    image.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_QUALITY, optimize=True)
    return buffer.getvalue()
