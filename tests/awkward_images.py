"""Awkward image files, made in memory, each with what the decoder must say of it."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, features

from convoy.core.records import RejectCode
from convoy.vision.decode_rule import DecodeFlag
from image_files import (
    STORED_AS,
    encode,
    grey_rgb,
    orientation_exif,
    over,
    photo,
    png_chunk,
    png_file,
    quadrants,
    scan_a_channel,
    with_jpeg_frame,
)

WHITE = (255, 255, 255)


@dataclass(frozen=True, kw_only=True)
class AwkwardCase:
    """A file and its verdict under DecodeRule(): a reject code, or flags and, if known, pixels."""

    name: str
    data: bytes
    expected: RejectCode | None = None
    flags: frozenset[DecodeFlag] = frozenset()
    pixels_HWC: np.ndarray | None = None
    tolerance: int = 0


def awkward_cases() -> list[AwkwardCase]:
    """All cases, with unique names."""
    makers: tuple[Callable[[], Iterator[AwkwardCase]], ...] = (
        _not_images,
        _foreign_formats,
        _damaged,
        _odd_sizes,
        _several_frames,
        _grey_and_palettes,
        _inks,
        _odd_tiffs,
        _deep_samples,
        _transparent,
        _rotated,
        _heavy_metadata,
        _harmless,
    )
    return [case for make in makers for case in make()]


def write_awkward_folder(root: Path) -> list[AwkwardCase]:
    """Write every case as `<name>` into a folder, and return the cases."""
    cases = awkward_cases()
    root.mkdir(parents=True, exist_ok=True)
    for case in cases:
        (root / case.name).write_bytes(case.data)
    return cases


def _decoded(
    name: str, data: bytes, *flags: DecodeFlag, pixels: np.ndarray | None = None, tolerance: int = 0
) -> AwkwardCase:
    return AwkwardCase(name=name, data=data, flags=frozenset(flags), pixels_HWC=pixels, tolerance=tolerance)


def _rejected(name: str, data: bytes, code: RejectCode) -> AwkwardCase:
    return AwkwardCase(name=name, data=data, expected=code)


def _not_images() -> Iterator[AwkwardCase]:
    yield _rejected("empty.jpg", b"", RejectCode.EMPTY)
    pages = {
        "html.jpg": b"<!DOCTYPE html><html><body>404 not found</body></html>",
        "json.jpg": b'{"error": "expired"}',
        "svg.jpg": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>',
        "pdf.jpg": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n",
        "zip.jpg": b"PK\3\4" + bytes(40),
        "gzip.jpg": b"\x1f\x8b\x08" + bytes(20),
        "text.jpg": "grüße\n".encode() * 300,
        "video.jpg": b"\0\0\0\x18ftypisom\0\0\2\0isomiso2" + bytes(64),
        "zeros.jpg": bytes(5000),
        "one_byte.jpg": b"\xff",
    }
    for name, data in pages.items():
        yield _rejected(name, data, RejectCode.NOT_AN_IMAGE)


def _foreign_formats() -> Iterator[AwkwardCase]:
    jpeg = encode(photo(), "JPEG")
    foreign = {
        "heic.jpg": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64),
        "jpeg_xl.jpg": b"\xff\x0a\xfa\x1f" + bytes(32),
        "jpeg_2000.jpg": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(64),
        "photoshop.jpg": b"8BPS\0\1" + bytes(40),
        "postscript.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "icon.jpg": encode(photo(32, 32), "ICO"),
        "netpbm.jpg": encode(photo(), "PPM"),
        "twelve_bit.jpg": with_jpeg_frame(jpeg, marker=0xC1, precision=12),
        "lossless.jpg": with_jpeg_frame(jpeg, marker=0xC3),
        "hierarchical.jpg": with_jpeg_frame(jpeg, marker=0xC5),
    }
    for name, data in foreign.items():
        yield _rejected(name, data, RejectCode.UNSUPPORTED_FORMAT)


def _damaged() -> Iterator[AwkwardCase]:
    files = {
        "baseline.jpg": encode(photo(), "JPEG"),
        "progressive.jpg": encode(photo(), "JPEG", progressive=True),
        "plain.png": encode(photo(), "PNG"),
        "plain.webp": encode(photo(), "WEBP"),
        "plain.bmp": encode(photo(), "BMP"),
        "raw.tif": encode(photo(), "TIFF"),
    }
    if features.check("avif"):
        files["plain.avif"] = encode(photo(), "AVIF")
    for name, data in files.items():
        yield _rejected(f"cut_at_60_percent_{name}", data[: len(data) * 6 // 10], RejectCode.TRUNCATED)
        yield _rejected(f"cut_by_one_byte_{name}", data[:-1], RejectCode.TRUNCATED)
    jpeg, png = files["baseline.jpg"], files["plain.png"]
    lzw = encode(photo(), "TIFF", compression="tiff_lzw")
    yield _rejected("cut_at_60_percent_lzw.tif", lzw[: len(lzw) * 6 // 10], RejectCode.TRUNCATED)
    # A TIFF does not say where it ends: a value outside its directory is lost here.
    yield _rejected("cut_by_one_byte_lzw.tif", lzw[:-1], RejectCode.CORRUPT)
    gif = encode(Image.fromarray(photo()).convert("P"), "GIF")
    yield _rejected("cut_at_60_percent.gif", gif[: len(gif) * 6 // 10], RejectCode.TRUNCATED)
    yield _rejected("cut_in_header.gif", gif[:100], RejectCode.TRUNCATED)
    yield _rejected("cut_in_header.jpg", jpeg[:100], RejectCode.TRUNCATED)
    yield _rejected("no_end_marker.jpg", jpeg[:-2], RejectCode.TRUNCATED)
    # A download into a preallocated file that stopped half way.
    zeros = bytes(len(jpeg) * 4 // 10)
    yield _rejected("zero_tail.jpg", jpeg[: -len(zeros)] + zeros, RejectCode.TRUNCATED)
    pixel_data = png.index(b"IDAT")
    bad_crc = bytearray(png)
    bad_crc[png.index(b"IEND") - 5] ^= 1
    yield _rejected("bad_pixel_crc.png", bytes(bad_crc), RejectCode.CORRUPT)
    flipped = bytearray(png)
    flipped[pixel_data + 200] ^= 0x10
    yield _rejected("flipped_pixel_byte.png", bytes(flipped), RejectCode.CORRUPT)
    bad_header = bytearray(png)
    bad_header[29] ^= 1
    yield _rejected("bad_header_crc.png", bytes(bad_header), RejectCode.CORRUPT)
    quantised = jpeg.index(b"\xff\xdb")
    yield _rejected("no_quantisation.jpg", jpeg[:quantised] + jpeg[quantised + 69 * 2 :], RejectCode.CORRUPT)
    for name, scanned in (
        ("progressive.jpg", files["progressive.jpg"]),
        ("baseline.jpg", scan_a_channel(photo())),
    ):
        yield _rejected(f"endless_scans_{name}", _many_scans(scanned), RejectCode.CORRUPT)


def _many_scans(jpeg: bytes) -> bytes:
    """A JPEG whose last scan is repeated a thousand times: little to read, much to do."""
    last_scan = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    return jpeg[:-2] + last_scan * 1000 + jpeg[-2:]


def _odd_sizes() -> Iterator[AwkwardCase]:
    # Headers that promise what no body follows.
    yield _rejected("bomb_400_megapixels.png", png_file((20000, 20000, 8, 2), b""), RejectCode.TOO_LARGE)
    yield _rejected("bomb_100_megapixels.png", png_file((10000, 10000, 8, 2), b""), RejectCode.TOO_LARGE)
    yield _rejected("bomb_60_megapixels.png", png_file((10000, 6000, 8, 2), b""), RejectCode.TOO_LARGE)
    jpeg = encode(photo(), "JPEG")
    size = jpeg.index(b"\xff\xc0") + 5
    huge = jpeg[:size] + struct.pack(">HH", 65000, 65000) + jpeg[size + 4 :]
    yield _rejected("bomb_4_gigapixels.jpg", huge, RejectCode.TOO_LARGE)
    screen, frame = struct.pack("<HHBBB", 65535, 65535, 0, 0, 0), struct.pack("<HHHHB", 0, 0, 65535, 65535, 0)
    gif = b"GIF89a" + screen + b"," + frame + b"\x08\0;"
    yield _rejected("bomb_4_gigapixels.gif", gif, RejectCode.TOO_LARGE)
    header = b"\x2f" + struct.pack("<I", 16383 | 16383 << 14) + bytes(11)
    webp = (
        b"RIFF" + struct.pack("<I", 12 + len(header)) + b"WEBPVP8L" + struct.pack("<I", len(header)) + header
    )
    yield _rejected("bomb_268_megapixels.webp", webp, RejectCode.TOO_LARGE)
    yield _rejected("one_pixel.png", encode(photo(1, 1), "PNG"), RejectCode.TOO_SMALL)
    yield _rejected("strip_1x5000.png", encode(photo(1, 5000), "PNG"), RejectCode.TOO_SMALL)
    yield _decoded("two_pixels.png", encode(photo(2, 2), "PNG"), pixels=photo(2, 2))
    yield _decoded("strip_2x5000.png", encode(photo(2, 5000), "PNG"), pixels=photo(2, 5000))


def _several_frames() -> Iterator[AwkwardCase]:
    frames = [Image.fromarray(photo(seed=seed)) for seed in range(3)]
    several: dict[str, Any] = {"save_all": True, "append_images": frames[1:]}
    first_only = DecodeFlag.FIRST_FRAME_ONLY
    yield _decoded("animated.png", encode(frames[0], "PNG", **several), first_only, pixels=photo(seed=0))
    yield _decoded("pages.tif", encode(frames[0], "TIFF", **several), first_only, pixels=photo(seed=0))
    # Pillow gives every animated WebP an alpha channel.
    webp = encode(frames[0], "WEBP", lossless=True, **several)
    yield _decoded("animated.webp", webp, first_only, DecodeFlag.ALPHA_COMPOSED, pixels=photo(seed=0))
    plain = [Image.new("P", (16, 8), index) for index in range(3)]
    for frame in plain:
        frame.putpalette([10, 20, 30, 200, 100, 50, 90, 90, 90])
    data = encode(plain[0], "GIF", save_all=True, append_images=plain[1:])
    first = np.full((8, 16, 3), (10, 20, 30), np.uint8)
    yield _decoded("animated.gif", data, first_only, DecodeFlag.PALETTE_EXPANDED, pixels=first)
    yield _decoded("pictures.mpo.jpg", encode(frames[0], "MPO", **several), first_only)


def _grey_and_palettes() -> Iterator[AwkwardCase]:
    grey = photo()[..., 0]
    yield _decoded("grey.png", encode(grey, "PNG"), DecodeFlag.GREY_EXPANDED, pixels=grey_rgb(grey))
    flat = np.full((16, 16), 77, np.uint8)
    yield _decoded("grey.jpg", encode(flat, "JPEG"), DecodeFlag.GREY_EXPANDED, pixels=grey_rgb(flat))
    bits = grey > 127
    yield _decoded(
        "one_bit.png",
        encode(Image.fromarray(bits), "PNG"),
        DecodeFlag.GREY_EXPANDED,
        pixels=grey_rgb(np.where(bits, 255, 0).astype(np.uint8)),
    )
    palette = Image.fromarray((grey // 64).astype(np.uint8), "L").convert("P")
    colours = np.array([[9, 8, 7], [60, 70, 80], [200, 10, 10], [1, 250, 3]], np.uint8)
    palette.putpalette(colours.flatten().tolist())
    for name in ("palette.png", "palette.gif", "palette.bmp", "palette.tif"):
        data = encode(palette, {"tif": "TIFF"}.get(name[-3:], name[-3:].upper()))
        yield _decoded(name, data, DecodeFlag.PALETTE_EXPANDED, pixels=colours[grey // 64])


def _inks() -> Iterator[AwkwardCase]:
    # Little of each ink: near white if the inks are read as Adobe stores them, near black if not.
    inks = np.full((16, 16, 4), (10, 20, 30, 0), np.uint8)
    paper = np.full((16, 16, 3), (245, 235, 225), np.uint8)
    cmyk = encode(Image.fromarray(inks, "CMYK"), "JPEG", quality=100)
    yield _decoded("cmyk_adobe.jpg", cmyk, DecodeFlag.CMYK_CONVERTED, pixels=paper, tolerance=2)
    marker = cmyk.index(b"\xff\xee")
    bare = cmyk[:marker] + cmyk[marker + 16 :]
    yield _decoded("cmyk_without_adobe.jpg", bare, DecodeFlag.CMYK_CONVERTED, pixels=paper, tolerance=2)
    yield _decoded("ycck.jpg", _ycck(), DecodeFlag.CMYK_CONVERTED, pixels=paper, tolerance=2)
    tiff = encode(Image.fromarray(inks, "CMYK"), "TIFF")
    yield _decoded("cmyk.tif", tiff, DecodeFlag.CMYK_CONVERTED, pixels=paper, tolerance=1)


def _odd_tiffs() -> Iterator[AwkwardCase]:
    grey = photo()[..., 0]
    yield _decoded("rgb.tif", encode(photo(), "TIFF"), pixels=photo())
    floats = Image.fromarray(grey.astype(np.float32))
    yield _rejected("float.tif", encode(floats, "TIFF"), RejectCode.UNSUPPORTED_FORMAT)
    integers = Image.fromarray(grey.astype(np.int32) * 1000)
    yield _rejected("int32.tif", encode(integers, "TIFF"), RejectCode.UNSUPPORTED_FORMAT)
    lab = Image.fromarray(photo(), "LAB")
    yield _rejected("lab.tif", encode(lab, "TIFF"), RejectCode.UNSUPPORTED_FORMAT)


def _ycck() -> bytes:
    """The inks of `_inks` as YCCK: CMY as YCbCr, the black plane inverted, Adobe's transform 2."""
    y_cb_cr = np.array(Image.new("RGB", (1, 1), (10, 20, 30)).convert("YCbCr"))[0, 0]
    # Pillow inverts all four planes when it saves.
    planes = np.full((16, 16, 4), (*(255 - y_cb_cr), 0), np.uint8)
    data = bytearray(encode(Image.fromarray(planes, "CMYK"), "JPEG", quality=100))
    data[data.index(b"\xff\xee") + 15] = 2
    return bytes(data)


def _deep_samples() -> Iterator[AwkwardCase]:
    levels = np.linspace(0, 65535, 48 * 64).astype(np.uint16).reshape(48, 64)
    flags = (DecodeFlag.GREY_EXPANDED, DecodeFlag.SIXTEEN_BIT_SCALED)
    high = grey_rgb((levels >> 8).astype(np.uint8))
    yield _decoded("sixteen_bit_grey.png", encode(Image.fromarray(levels), "PNG"), *flags, pixels=high)
    yield _decoded("sixteen_bit_grey.tif", encode(Image.fromarray(levels), "TIFF"), *flags, pixels=high)
    big_endian = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    keyed = png_file((64, 48, 16, 0), big_endian, png_chunk(b"tRNS", struct.pack(">H", 65535)))
    shown = high.copy()
    shown[-1, -1] = WHITE
    yield _decoded("sixteen_bit_grey_key.png", keyed, *flags, DecodeFlag.ALPHA_COMPOSED, pixels=shown)
    colour = np.stack([levels, levels[::-1], levels[:, ::-1]], axis=-1)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colour)
    yield _decoded(
        "sixteen_bit_colour.png",
        png_file((64, 48, 16, 2), rows),
        DecodeFlag.SIXTEEN_BIT_SCALED,
        pixels=(colour >> 8).astype(np.uint8),
    )


def _transparent() -> Iterator[AwkwardCase]:
    colour = photo()
    alpha = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (48, 1))
    shown = over(colour, alpha, WHITE)
    rgba = np.dstack([colour, alpha])
    for name in ("rgba.png", "rgba.webp", "rgba.tif"):
        options = {"lossless": True, "exact": True} if name.endswith("webp") else {}
        data = encode(rgba, {"tif": "TIFF"}.get(name[5:], name[5:].upper()), **options)
        yield _decoded(name, data, DecodeFlag.ALPHA_COMPOSED, pixels=shown, tolerance=1)
    grey = Image.merge("LA", (Image.fromarray(colour[..., 0]), Image.fromarray(alpha)))
    yield _decoded(
        "grey_alpha.png",
        encode(grey, "PNG"),
        DecodeFlag.ALPHA_COMPOSED,
        DecodeFlag.GREY_EXPANDED,
        pixels=over(grey_rgb(colour[..., 0]), alpha, WHITE),
        tolerance=1,
    )
    index = np.tile(np.array([0, 1, 2, 1], np.uint8), (8, 4))
    palette = Image.fromarray(index).convert("P")
    colours = np.array([[9, 8, 7], [60, 70, 80], [200, 10, 10]], np.uint8)
    palette.putpalette(colours.flatten().tolist())
    shown = np.where((index == 1)[..., None], 255, colours[index]).astype(np.uint8)
    flags = (DecodeFlag.ALPHA_COMPOSED, DecodeFlag.PALETTE_EXPANDED)
    for name in ("palette_alpha.png", "palette_alpha.gif"):
        data = encode(palette, name[-3:].upper(), transparency=1)
        yield _decoded(name, data, *flags, pixels=shown)
    hidden = np.dstack([np.full((8, 8, 3), (255, 0, 0), np.uint8), np.zeros((8, 8), np.uint8)])
    blank = np.full((8, 8, 3), 255, np.uint8)
    yield _decoded("hidden_colour.png", encode(hidden, "PNG"), DecodeFlag.ALPHA_COMPOSED, pixels=blank)
    keyed = photo(8, 8)
    data = encode(keyed, "PNG", transparency=tuple(int(level) for level in keyed[0, 0]))
    shown = np.where((keyed == keyed[0, 0]).all(axis=-1, keepdims=True), 255, keyed).astype(np.uint8)
    yield _decoded("colour_key.png", data, DecodeFlag.ALPHA_COMPOSED, pixels=shown)


def _rotated() -> Iterator[AwkwardCase]:
    upright = quadrants()
    options: dict[str, dict[str, Any]] = {
        "JPEG": {"quality": 100, "subsampling": 0},
        "PNG": {},
        "WEBP": {"lossless": True},
        "TIFF": {},
    }
    for orientation in range(1, 9):
        stored = Image.fromarray(upright)
        if orientation > 1:
            stored = stored.transpose(STORED_AS[orientation])
        flags = [DecodeFlag.EXIF_ROTATED] if orientation > 1 else []
        for image_format, chosen in options.items():
            data = encode(stored, image_format, exif=orientation_exif(orientation), **chosen)
            name = f"orientation_{orientation}.{image_format.lower()}"
            yield _decoded(name, data, *flags, pixels=upright, tolerance=2 if image_format == "JPEG" else 0)


def _heavy_metadata() -> Iterator[AwkwardCase]:
    colour = photo()
    profile = bytes(range(256)) * 300
    icc = DecodeFlag.ICC_PROFILE_IGNORED
    yield _decoded("profile.png", encode(colour, "PNG", icc_profile=profile), icc, pixels=colour)
    yield _decoded("profile.jpg", encode(colour, "JPEG", icc_profile=profile), icc)
    comments = b"\xff\xfe\xff\xff" + bytes(65533)
    jpeg = encode(np.full((16, 16, 3), 90, np.uint8), "JPEG")
    flat = np.full((16, 16, 3), 90, np.uint8)
    yield _decoded("comments_of_1_mb.jpg", jpeg[:2] + comments * 16 + jpeg[2:], pixels=flat)
    garbage_exif = b"\xff\xe1\xff\xffExif\0\0II*\0\xff\xff\xff\x7f" + b"\xaa" * (65533 - 14)
    yield _decoded("garbage_exif_of_64_kb.jpg", jpeg[:2] + garbage_exif + jpeg[2:], pixels=flat)
    rows = b"\0\1\2\3\4\5\6" * 2
    text_bomb = png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(200 << 20), 9))
    yield _rejected("text_bomb.png", png_file((2, 2, 8, 2), rows, text_bomb), RejectCode.CORRUPT)


def _harmless() -> Iterator[AwkwardCase]:
    flat = np.full((16, 16, 3), 90, np.uint8)
    jpeg, png = encode(flat, "JPEG"), encode(photo(), "PNG")
    yield _decoded("junk_after_end.jpg", jpeg + b"junk" * 100, pixels=flat)
    yield _decoded("junk_after_end.png", png + b"junk" * 100, pixels=photo())
    yield _decoded("png_by_another_name.jpg", png, pixels=photo())
    yield _decoded("progressive.jpg", encode(flat, "JPEG", progressive=True), pixels=flat)
    if features.check("avif"):
        yield _decoded("plain.avif", encode(flat, "AVIF", quality=100), pixels=flat, tolerance=2)
    gif = encode(Image.fromarray(flat).quantize(4), "GIF")
    yield _decoded("no_trailer.gif", gif[:-1], DecodeFlag.PALETTE_EXPANDED, pixels=flat)
