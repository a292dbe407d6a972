"""Image files and pixels made in memory, for tests of decoding."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image

ORIENTATION_TAG = 274

ByteOrder = Literal["<", ">"]


def encode(pixels_HWC: np.ndarray | Image.Image, image_format: str, **options: Any) -> bytes:
    """A file of the format that holds the pixels."""
    image = pixels_HWC if isinstance(pixels_HWC, Image.Image) else Image.fromarray(pixels_HWC)
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def photo(height_px: int = 48, width_px: int = 64, seed: int = 0) -> np.ndarray:
    """A smooth colour picture with some noise, uint8 of shape (height, width, 3)."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height_px, 0:width_px]
    waves = np.stack([np.sin(rows / 7 + c) + np.cos(columns / 9 - c) for c in range(3)], axis=-1)
    return np.clip(127 + 55 * waves + rng.normal(0, 6, waves.shape), 0, 255).astype(np.uint8)


def quadrants() -> np.ndarray:
    """16 x 24 pixels, each quadrant of one grey level: every turn and mirror of it is different."""
    grey = np.kron(np.array([[20, 90], [160, 230]], dtype=np.uint8), np.ones((8, 12), np.uint8))
    return np.repeat(grey[..., None], 3, axis=-1)


# What to do to an upright image to store it under each orientation (CIPA DC-008): for example 6 says that the
# stored first row is the right side, and the stored first column the top.
STORED_AS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def orientation_exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    return exif


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_file(header: tuple[int, int, int, int], raw: bytes, *extra: bytes) -> bytes:
    """A PNG from (width, height, bit depth, colour type), filtered rows, and chunks before the pixel data."""
    ihdr = png_chunk(b"IHDR", struct.pack(">IIBBBBB", *header, 0, 0, 0))
    idat = png_chunk(b"IDAT", zlib.compress(raw))
    return b"\x89PNG\r\n\x1a\n" + ihdr + b"".join(extra) + idat + png_chunk(b"IEND", b"")


def tiff_file(tags: Mapping[int, int], planes: Sequence[bytes], byte_order: ByteOrder = "<") -> bytes:
    """An uncompressed TIFF of one strip a plane, as Pillow cannot write it; each plane as long as the first."""
    num_planes, num_bytes = len(planes), len(planes[0])
    arrays = 8 + 2 + (len(tags) + 3) * 12 + 4
    start = arrays + 8 * num_planes
    offsets = [start + place * num_bytes for place in range(num_planes)]
    pointers = {273: arrays, 279: arrays + 4 * num_planes} if num_planes > 1 else {273: start, 279: num_bytes}
    entries = b"".join(
        struct.pack(f"{byte_order}HHII", tag, 4, num_planes if tag in pointers else 1, value)
        for tag, value in sorted({**tags, 259: 1, **pointers}.items())
    )
    lengths = struct.pack(f"{byte_order}{2 * num_planes}I", *offsets, *[num_bytes] * num_planes)
    header = {"<": b"II*\0", ">": b"MM\0*"}[byte_order] + struct.pack(f"{byte_order}IH", 8, len(tags) + 3)
    return header + entries + bytes(4) + lengths + b"".join(planes)


def with_jpeg_frame(jpeg: bytes, *, marker: int | None = None, precision: int | None = None) -> bytes:
    """The JPEG with another frame marker or sample precision in its header."""
    patched = bytearray(jpeg)
    position = jpeg.index(b"\xff\xc0")
    patched[position + 1] = marker or patched[position + 1]
    patched[position + 4] = precision or patched[position + 4]
    return bytes(patched)


def grey_rgb(grey_HW: np.ndarray) -> np.ndarray:
    return np.repeat(grey_HW[..., None], 3, axis=-1)


def over(foreground_HWC: np.ndarray, alpha_HW: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    """The compositing rule, in real numbers: alpha x foreground + (1 - alpha) x background."""
    alpha = alpha_HW[..., None] / 255
    return np.rint(alpha * foreground_HWC + (1 - alpha) * np.array(background)).astype(np.uint8)


def scan_a_channel(ycbcr_HWC: np.ndarray) -> bytes:
    """A baseline JPEG whose three channels come in scans of their own: those of three grey files, with their tables."""
    grey = [encode(np.ascontiguousarray(ycbcr_HWC[..., channel]), "JPEG", quality=95) for channel in range(3)]
    first = grey[0]
    frame, scan = first.index(b"\xff\xc0"), first.index(b"\xff\xda")
    # Precision, height and width stay; three components without subsampling take the place of one.
    size = first[frame + 4 : frame + 9]
    components = b"".join(bytes([number, 0x11, 0]) for number in (1, 2, 3))
    head = first[:frame] + b"\xff\xc0" + struct.pack(">H", 17) + size + b"\x03" + components
    tables = first[frame + 2 + 11 : scan]
    scans = [
        b"\xff\xda\x00\x08\x01" + bytes([number, 0, 0, 63, 0]) + one[one.index(b"\xff\xda") + 10 : -2]
        for number, one in enumerate(grey, start=1)
    ]
    return head + tables + b"".join(scans) + b"\xff\xd9"
