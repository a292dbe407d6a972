"""What some bytes are, by their content: for names in rejects, and to tell damage from a cut.

Nothing here decodes pixels, and nothing trusts a length that the bytes claim.
"""

from __future__ import annotations

import codecs
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum


class ImageFormat(StrEnum):
    """The formats that Convoy decodes, by Pillow's names."""

    JPEG = "JPEG"
    PNG = "PNG"
    WEBP = "WEBP"
    GIF = "GIF"
    BMP = "BMP"
    TIFF = "TIFF"
    AVIF = "AVIF"


_EXTENSIONS = {
    "jpg": ImageFormat.JPEG,
    "jpeg": ImageFormat.JPEG,
    "jpe": ImageFormat.JPEG,
    "jfif": ImageFormat.JPEG,
    "png": ImageFormat.PNG,
    "webp": ImageFormat.WEBP,
    "gif": ImageFormat.GIF,
    "bmp": ImageFormat.BMP,
    "tif": ImageFormat.TIFF,
    "tiff": ImageFormat.TIFF,
    "avif": ImageFormat.AVIF,
}


def named_format(name: str) -> ImageFormat | None:
    """The format that the extension of a file's name promises, or None where it is none of an image."""
    return _EXTENSIONS.get(name.rpartition(".")[2].lower())


class Family(StrEnum):
    """Whether bytes show a picture in some format, or are something else."""

    IMAGE = "image"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Kind:
    """A name for the content of some bytes. `format` is None for all that Convoy does not decode."""

    name: str
    family: Family
    format: ImageFormat | None = None


class Damage(StrEnum):
    """How a file is broken."""

    CUT_SHORT = "cut_short"
    BAD_CHECKSUM = "bad_checksum"


_HEAD_BYTES = 1024

_IMAGE_MAGICS: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (8, b"WEBP", "WEBP"),
    (0, b"GIF8", "GIF"),
    (0, b"BM", "BMP"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"II+\0", "TIFF"),
    (0, b"MM\0+", "TIFF"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    (0, b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"8BPS", "Photoshop"),
    (0, b"%!PS", "PostScript"),
    (0, b"\xc5\xd0\xd3\xc6", "PostScript"),
    (0, b"\0\0\1\0", "Windows icon"),
    (0, b"icns", "Apple icon"),
    (0, b"DDS ", "DDS"),
    (0, b"qoif", "QOI"),
    (0, b"v/1\1", "OpenEXR"),
    (0, b"SIMPLE  =", "FITS"),
    (0, b"gimp xcf", "GIMP"),
    (0, b"BPG\xfb", "BPG"),
    (0, b"\x8aMNG", "MNG"),
    *((0, b"P%d\n" % digit, "Netpbm") for digit in range(1, 8)),
)

_OTHER_MAGICS: tuple[tuple[int, bytes, str], ...] = (
    (0, b"%PDF-", "PDF"),
    (0, b"PK\3\4", "zip"),
    (0, b"\x1f\x8b", "gzip"),
    (0, b"BZh", "bzip2"),
    (0, b"\xfd7zXZ\0", "xz"),
    (0, b"\x28\xb5\x2f\xfd", "zstd"),
    (257, b"ustar", "tar"),
    (0, b"PAR1", "parquet"),
    (0, b"\x93NUMPY", "NumPy"),
    (0, b"\x1aE\xdf\xa3", "Matroska video"),
)

_MARKUP: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("HTML", ("<!doctype html", "<html", "<head", "<body")),
    ("SVG", ("<svg", "<!doctype svg")),
    ("XML", ("<",)),
    ("JSON", ("{", "[")),
)

_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")

# SOF markers of sequential and progressive coding, Huffman or arithmetic; the others are lossless or
# hierarchical.
_USUAL_FRAMES = (0xC0, 0xC1, 0xC2, 0xC9, 0xCA)
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_SCAN = b"\xff\xda"
_JPEG_END = b"\xff\xd9"


def sniff(data: bytes) -> Kind:
    """The kind of some bytes. Always answers: the last resorts are "text" and "unknown bytes <hex>"."""
    for offset, magic, name in _IMAGE_MAGICS:
        if data.startswith(magic, offset):
            known = ImageFormat(name) if name in ImageFormat.__members__ else None
            return Kind(name, Family.IMAGE, known)
    for offset, magic, name in _OTHER_MAGICS:
        if data.startswith(magic, offset):
            return Kind(name, Family.OTHER)
    if data[4:8] == b"ftyp":
        return _sniff_media_brands(data)
    return Kind(_sniff_text(data[:_HEAD_BYTES]) or f"unknown bytes {data[:8].hex(' ')}", Family.OTHER)


def _sniff_media_brands(data: bytes) -> Kind:
    end = min(int.from_bytes(data[:4], "big"), _HEAD_BYTES)
    brands = [data[start : start + 4] for start in (8, *range(16, end, 4))]
    if b"avif" in brands or b"avis" in brands:
        return Kind("AVIF", Family.IMAGE, ImageFormat.AVIF)
    if any(brand in _HEIC_BRANDS for brand in brands):
        return Kind("HEIC", Family.IMAGE)
    return Kind("MP4 video", Family.OTHER)


def _sniff_text(head: bytes) -> str | None:
    try:
        # Incremental, because the head may end inside a character.
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head)
    except UnicodeDecodeError:
        return None
    text = text.strip().lower()
    if any(ord(character) < ord(" ") and character not in "\t\n\r\f" for character in text):
        return None
    if text.startswith("<?xml") and "<svg" in text:
        return "SVG"
    for name, openings in _MARKUP:
        if text.startswith(openings):
            return name
    return "text"


def unusual_jpeg_process(data: bytes) -> str | None:
    """Why no decoder here reads this valid kind of JPEG, such as "12-bit"; None for the usual kinds."""
    position = 2
    while position + 9 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker in _FRAMES:
            if data[position + 4] != 8:
                return f"{data[position + 4]}-bit"
            return None if marker in _USUAL_FRAMES else "lossless or hierarchical"
        if data.startswith(_JPEG_SCAN, position):
            return None
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return None


def is_cut_short(data: bytes, image_format: ImageFormat) -> bool:
    """True if the file ends before the end that its format marks or declares."""
    match image_format:
        case ImageFormat.JPEG:  # a thumbnail in the header has an end marker too, but before the last scan
            least_bytes = 0 if data.rfind(_JPEG_END) > data.rfind(_JPEG_SCAN) else len(data) + 1
        case ImageFormat.PNG:
            least_bytes = len(data) + 1 if png_damage(data) is Damage.CUT_SHORT else 0
        case ImageFormat.WEBP:
            least_bytes = int.from_bytes(data[4:8], "little") + 8
        case ImageFormat.GIF:
            least_bytes = 0 if data.endswith(b";") else len(data) + 1
        case ImageFormat.BMP:
            least_bytes = int.from_bytes(data[2:6], "little")
        case ImageFormat.TIFF:
            # A TIFF declares no end, but often its directory comes last.
            least_bytes = int.from_bytes(data[4:8], "little" if data.startswith(b"I") else "big") + 2
        case ImageFormat.AVIF:
            least_bytes = max(_box_ends(data), default=8)
    return least_bytes > len(data)


def _box_ends(data: bytes) -> Iterator[int]:
    """Where the top-level boxes of an ISO media file claim to end."""
    position = 0
    while position + 8 <= len(data):
        size_bytes = int.from_bytes(data[position : position + 4], "big")
        if size_bytes < 8:  # 0: up to the end of the file; 1: a 64-bit size, which no sane image has
            return
        position += size_bytes
        yield position


def png_damage(data: bytes) -> Damage | None:
    """The first damage in a PNG's chunks, or None. What follows the IEND chunk is not looked at.

    Pillow does not check the CRC of pixel data, so damage would pass as a picture. About 1 ms a MB.
    """
    view = memoryview(data)
    position = 8
    while position + 12 <= len(data):
        size_bytes = int.from_bytes(view[position : position + 4], "big")
        end = position + 8 + size_bytes
        if end + 4 > len(data):
            return Damage.CUT_SHORT
        if zlib.crc32(view[position + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            return Damage.BAD_CHECKSUM
        if data.startswith(b"IEND", position + 4):
            return None
        position = end + 4
    return Damage.CUT_SHORT
