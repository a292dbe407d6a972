"""Bytes in, a uint8 RGB image or a reject out. One declared rule for every oddity of the formats."""

from __future__ import annotations

import ctypes
import io
import logging
import re
import warnings
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError, features
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import OPEN_INFO, TiffImageFile

from convoy.core.records import RejectCode, SampleRejected, Stage
from convoy.vision.decode_rule import PILLOW_MAX_PIXELS, DecodeFlag, DecodeRule
from convoy.vision.sniffing import (
    Damage,
    Family,
    ImageFormat,
    is_cut_short,
    png_damage,
    sniff,
    unusual_jpeg_process,
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DecodedImage:
    """An upright RGB image: uint8 of shape (3, height, width), channels last in memory: best for resize."""

    pixels_CHW: torch.Tensor
    format: ImageFormat
    flags: frozenset[DecodeFlag]


_SIXTEEN_BIT_GREY = ("I;16", "I;16L", "I;16B", "I;16N")
# TIFF 6.0, section 8: a value of PhotometricInterpretation, and one of PlanarConfiguration.
_WHITE_IS_ZERO = 0
_SEPARATE_PLANES = 2
# By Pillow's raw mode of a PNG: what a sample is multiplied by, and rounded down, on its way to 8 bits.
_SAMPLE_FACTORS = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}

_MODE_FLAGS: dict[str, DecodeFlag | None] = {
    "1": DecodeFlag.GREY_EXPANDED,
    "L": DecodeFlag.GREY_EXPANDED,
    "LA": DecodeFlag.GREY_EXPANDED,
    **dict.fromkeys(_SIXTEEN_BIT_GREY, DecodeFlag.GREY_EXPANDED),
    "P": DecodeFlag.PALETTE_EXPANDED,
    "PA": DecodeFlag.PALETTE_EXPANDED,
    "RGB": None,
    "RGBA": None,
    "RGBX": None,
    "YCbCr": None,
    "CMYK": DecodeFlag.CMYK_CONVERTED,
}

# EXIF orientation: whether to swap the axes, then which axes of (C, H, W) to flip (CIPA DC-008, tag 274).
_TURNS: dict[int, tuple[Literal["swap", "keep"], tuple[int, ...]]] = {
    2: ("keep", (2,)),
    3: ("keep", (1, 2)),
    4: ("keep", (1,)),
    5: ("swap", ()),
    6: ("swap", (2,)),
    7: ("swap", (1, 2)),
    8: ("swap", (1,)),
}

# A scan of a JPEG may cost time over the whole image in a few bytes, and may be repeated; real files have ten or so.
_MAX_SCANS = 100
# The marker and the upper byte of its header's length: the marker alone occurs by chance in what follows an image.
# `bytes.count` takes twice the time.
_START_OF_SCAN = re.compile(rb"\xff\xda\x00")
_REASON_CHARACTERS = 160
# torchvision.io.ImageReadMode.RGB, whose module is imported late.
_AS_RGB = 3


def decode_image(data: bytes, rule: DecodeRule) -> DecodedImage:
    """The image in some bytes, upright and in RGB.

    Raises SampleRejected with the stage DECODE: a property of the bytes and the rule, never of the machine. What is
    the machine's passes: a MemoryError, torch's failed allocation, a broken torchvision. Size limits hold before
    pixels are allocated. Thread-safe; releases the GIL while it decodes. Of the metadata only the orientation is used.
    """
    if not data:
        raise _reject(RejectCode.EMPTY, "the object has no bytes")
    if len(data) > rule.max_bytes:
        raise _reject(RejectCode.TOO_LARGE, f"{len(data)} bytes; the limit is {rule.max_bytes}")
    # Here because it takes seconds that planning a job need not pay, and before anything is the image's fault.
    import torchvision.io  # noqa: F401, PLC0415

    try:
        with Image.open(io.BytesIO(data), formats=rule.formats) as image:
            _check_header(image, rule)
            decoded = _decode_opened(image, data, rule)
            orientation = _orientation(image)
    except (SampleRejected, MemoryError):
        raise
    except Image.DecompressionBombError:
        reason = f"the header declares more than {PILLOW_MAX_PIXELS} pixels"
        raise _reject(RejectCode.TOO_LARGE, reason) from None
    except Exception as error:  # hostile bytes make decoders fail in any way
        raise _verdict(data, rule, error) from error
    return _upright(decoded, orientation)


def quiet_decoders() -> None:
    """Keep the decoders' own messages out of stderr and logs. A worker process calls this once, as it starts.

    libjpeg and libtiff write about damaged files, without a name, to C's `stderr`; Pillow warns, logs errors,
    and metadata when debugging. What matters of it is in flags and rejects. Whoever writes to file
    descriptor 2 is untouched: Python, faulthandler, C++ streams.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    libc = ctypes.CDLL(None)
    libc.fopen.restype = ctypes.c_void_p
    try:
        c_stderr = ctypes.c_void_p.in_dll(libc, "stderr")
    except ValueError:  # no such symbol outside Linux
        return
    c_stderr.value = libc.fopen(b"/dev/null", b"w")


def _reject(code: RejectCode, reason: str) -> SampleRejected:
    return SampleRejected(code, Stage.DECODE, reason)


def _check_header(image: Image.Image, rule: DecodeRule) -> None:
    width_px, height_px = image.size
    if width_px * height_px > rule.max_pixels:
        raise _reject(RejectCode.TOO_LARGE, f"{width_px}x{height_px} pixels; the limit is {rule.max_pixels}")
    if min(width_px, height_px) < rule.min_side_px:
        raise _reject(
            RejectCode.TOO_SMALL, f"{width_px}x{height_px} pixels; the least side is {rule.min_side_px}"
        )
    if image.mode not in _MODE_FLAGS:
        raise _reject(RejectCode.UNSUPPORTED_FORMAT, f"pixels of mode {image.mode} have no declared range")


def _decode_opened(image: ImageFile.ImageFile, data: bytes, rule: DecodeRule) -> DecodedImage:
    # Pillow calls a JPEG that holds several pictures MPO.
    image_format = ImageFormat.JPEG if image.format == "MPO" else ImageFormat(str(image.format))
    if isinstance(image, TiffImageFile) and rule.version > 3:
        _name_planes(image)
    flags = _header_flags(image)
    if image_format is ImageFormat.JPEG:
        pixels_CHW = _decode_jpeg(image, data, rule)
    else:
        pixels_CHW = _decode_with_pillow(image, data, rule)
    return DecodedImage(pixels_CHW=pixels_CHW, format=image_format, flags=frozenset(flags))


def _header_flags(image: ImageFile.ImageFile) -> set[DecodeFlag]:
    mode_flag = _MODE_FLAGS[image.mode]
    flags = {mode_flag} if mode_flag else set()
    if image.has_transparency_data:
        flags.add(DecodeFlag.ALPHA_COMPOSED)
    if getattr(image, "is_animated", False):
        flags.add(DecodeFlag.FIRST_FRAME_ONLY)
    if "icc_profile" in image.info:
        flags.add(DecodeFlag.ICC_PROFILE_IGNORED)
    # Pillow keeps the depth of colour samples only in the raw mode of its tiles, such as "RGB;16B".
    if image.format in (ImageFormat.PNG, ImageFormat.TIFF) and ";16" in str(image.tile):
        flags.add(DecodeFlag.SIXTEEN_BIT_SCALED)
    # Pillow turns a TIFF upright while it loads it, and then forgets the tag.
    if image.format == ImageFormat.TIFF and _orientation(image) in _TURNS:
        flags.add(DecodeFlag.EXIF_ROTATED)
    return flags


def _decode_jpeg(image: Image.Image, data: bytes, rule: DecodeRule) -> torch.Tensor:
    """torchvision's decoder gives Pillow's pixels faster; where it fails, Pillow has the last word."""
    if any(islice(_START_OF_SCAN.finditer(data), _MAX_SCANS, None)):
        raise _reject(RejectCode.CORRUPT, f"a JPEG of more than {_MAX_SCANS} scans")
    try:
        # The operator itself: its wrapper is deprecated and warns. Without the operator, JPEGs are slower.
        pixels_CHW: torch.Tensor = torch.ops.image.decode_jpeg(
            torch.frombuffer(bytearray(data), dtype=torch.uint8), _AS_RGB, False
        )
    except (RuntimeError, AttributeError):
        return _decode_with_pillow(image, data, rule)
    return pixels_CHW


def _decode_with_pillow(image: Image.Image, data: bytes, rule: DecodeRule) -> torch.Tensor:
    if image.format == ImageFormat.PNG and (damage := png_damage(data)):
        code = RejectCode.TRUNCATED if damage is Damage.CUT_SHORT else RejectCode.CORRUPT
        raise _reject(code, f"PNG: {damage.replace('_', ' ')}")
    if rule.version > 2:
        _scale_colour_key(image)
    image.load()
    if image.format in (ImageFormat.JPEG, "MPO") and is_cut_short(data, ImageFormat.JPEG):
        raise _reject(RejectCode.TRUNCATED, "JPEG: no end marker")
    pixels_HWC = np.array(_as_rgb(image, rule))
    return torch.from_numpy(pixels_HWC).permute(2, 0, 1)


def _name_planes(image: TiffImageFile) -> None:
    """Give Pillow the raw mode of each plane of an uncompressed TIFF whose channels lie apart.

    It takes the letters of a pixel's raw mode one by one, "R" of "RGB;16L", and so loses what samples are.
    """
    tags = image.tag_v2
    # Of the codec "raw" these are tuples: the raw mode, the bytes of a row, which row comes first.
    tiles: list[Any] = [tile for tile in image.tile if tile.codec_name == "raw"]
    if tags.get(ExifTags.Base.PlanarConfiguration) != _SEPARATE_PLANES or not tiles:
        return
    num_bits, fill_order = _sample_bits(image), tags.get(ExifTags.Base.FillOrder, 1)
    if image.mode in ("1", "L", "P", *_SIXTEEN_BIT_GREY):
        photometric = tags[ExifTags.Base.PhotometricInterpretation]
        sample_format = tags.get(ExifTags.Base.SampleFormat, (1,))[:1]
        _, raw_mode = OPEN_INFO[tags.prefix, photometric, sample_format, fill_order, (num_bits,), ()]
        raw_modes = [raw_mode] * len(tiles)
    elif image.mode in ("RGB", "RGBA") and num_bits == 16:
        depth = "16L" if tags.prefix == b"II" else "16B"
        raw_modes = [f"{tile.args[0]};{depth}" for tile in tiles]
    elif num_bits == 8 and fill_order == 1:
        return
    else:
        reason = f"TIFF: {image.mode} of {num_bits} bits in separate planes, in fill order {fill_order}"
        raise _reject(RejectCode.UNSUPPORTED_FORMAT, reason)
    image.tile = [
        tile._replace(args=(raw_mode, *tile.args[1:]))
        for tile, raw_mode in zip(tiles, raw_modes, strict=True)
    ]


def _scale_colour_key(image: Image.Image) -> None:
    """Give the colour that a PNG declares transparent in the 8 bits of Pillow's samples, which leaves it as it is."""
    key = image.info.get("transparency")
    raw_mode = image.tile[0].args if isinstance(image, PngImageFile) and image.tile else None
    if key is None or raw_mode not in _SAMPLE_FACTORS:
        return
    factor = _SAMPLE_FACTORS[raw_mode]
    is_colour = isinstance(key, tuple)
    image.info["transparency"] = (
        tuple(int(level * factor) for level in key) if is_colour else int(key * factor)
    )


def _as_rgb(image: Image.Image, rule: DecodeRule) -> Image.Image:
    if image.mode in _SIXTEEN_BIT_GREY:
        num_bits = _grey_bits(image) if rule.version > 2 else 16
        image = _upper_bits(image, num_bits, inverted=rule.version > 1 and _zero_is_white(image))
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    canvas = Image.new("RGB", image.size, rule.background_rgb)
    canvas.paste(layer, mask=layer)
    return canvas


def _zero_is_white(image: Image.Image) -> bool:
    """Whether a TIFF counts its grey from white to black. Pillow turns that round, but not at 16 bits."""
    photometric = getattr(image, "tag_v2", {}).get(ExifTags.Base.PhotometricInterpretation)
    return image.format == ImageFormat.TIFF and photometric == _WHITE_IS_ZERO


def _grey_bits(image: Image.Image) -> int:
    """How many bits of the 16 that Pillow gives a sample of grey are used: a TIFF may have 12, numbers up to 4095."""
    return _sample_bits(image) if isinstance(image, TiffImageFile) else 16


def _sample_bits(image: TiffImageFile) -> int:
    bits: tuple[int, ...] = image.tag_v2.get(ExifTags.Base.BitsPerSample, (1,))
    return bits[0]


def _upper_bits(image: Image.Image, num_bits: int, *, inverted: bool) -> Image.Image:
    """Grey of more than 8 bits as 8-bit grey; a transparent grey level, which is a 16-bit number, becomes alpha."""
    samples_HW = np.asarray(image)
    levels_HW = ~samples_HW if inverted else samples_HW
    grey = Image.fromarray((levels_HW >> (num_bits - 8)).astype(np.uint8))
    transparent_level = image.info.get("transparency")
    if transparent_level is None:
        return grey
    alpha = Image.fromarray(np.where(samples_HW == transparent_level, 0, 255).astype(np.uint8))
    return Image.merge("LA", (grey, alpha))


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except MemoryError:
        raise
    except Exception:  # broken metadata is no reason to lose good pixels
        return 1


def _upright(decoded: DecodedImage, orientation: int) -> DecodedImage:
    if orientation not in _TURNS:
        return decoded
    axes, flipped = _TURNS[orientation]
    pixels_CHW = decoded.pixels_CHW.transpose(1, 2) if axes == "swap" else decoded.pixels_CHW
    turned_CHW = pixels_CHW.flip(flipped).permute(1, 2, 0).contiguous().permute(2, 0, 1)
    return replace(decoded, pixels_CHW=turned_CHW, flags=decoded.flags | {DecodeFlag.EXIF_ROTATED})


def _verdict(data: bytes, rule: DecodeRule, error: Exception) -> SampleRejected:
    """The reject for bytes that could not be opened or decoded."""
    kind = sniff(data)
    if kind.format is None:
        code = RejectCode.UNSUPPORTED_FORMAT if kind.family is Family.IMAGE else RejectCode.NOT_AN_IMAGE
        return _reject(code, kind.name)
    if kind.format not in rule.formats:
        return _reject(RejectCode.UNSUPPORTED_FORMAT, f"{kind.name}: not among the rule's formats")
    if kind.format in (ImageFormat.AVIF, ImageFormat.WEBP) and not features.check(kind.format.lower()):
        return _reject(RejectCode.UNSUPPORTED_FORMAT, f"{kind.name}: not in this build of Pillow")
    if kind.format is ImageFormat.JPEG and (process := unusual_jpeg_process(data)):
        return _reject(RejectCode.UNSUPPORTED_FORMAT, f"JPEG: {process}")
    message = "no valid header" if isinstance(error, UnidentifiedImageError) else str(error)
    cut_short = "truncated" in message.lower() or is_cut_short(data, kind.format)
    reason = f"{kind.name}: {type(error).__name__}: {message}"[:_REASON_CHARACTERS]
    return _reject(RejectCode.TRUNCATED if cut_short else RejectCode.CORRUPT, reason)
