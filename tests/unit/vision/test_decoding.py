from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import tarfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from awkward_images import AwkwardCase, awkward_cases, write_awkward_folder
from convoy.core.fingerprints import digest
from convoy.core.records import FETCH_CODES, RejectCode, SampleRejected, Stage
from convoy.vision.decode_rule import DecodeFlag, DecodeRule
from convoy.vision.decoding import DecodedImage, decode_image
from convoy.vision.sniffing import ImageFormat, sniff
from image_files import encode, orientation_exif, photo, png_chunk, png_file, scan_a_channel

ROOT = Path(__file__).parents[3]
REAL_DATA = Path(os.environ.get("CONVOY_TEST_DATA") or ROOT.parent / "shared" / "data")
RULE = DecodeRule()
CASES = awkward_cases()


def rejection(data: bytes, rule: DecodeRule = RULE) -> SampleRejected:
    with pytest.raises(SampleRejected) as caught:
        decode_image(data, rule)
    return caught.value


def pixels_HWC(image: DecodedImage) -> np.ndarray:
    return image.pixels_CHW.permute(1, 2, 0).numpy()


def archived_jpegs(archive: str, count: int) -> Iterator[bytes]:
    path = REAL_DATA / archive
    if not path.exists():
        pytest.skip(f"real data not found at {path}; set CONVOY_TEST_DATA")
    with tarfile.open(path) as tar:
        members = (member for member in tar if member.name.lower().endswith((".jpg", ".jpeg")))
        for member in islice(members, count):
            yield tar.extractfile(member).read()


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "lib"), str(ROOT / "tests")])}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_awkward_file_gets_its_verdict(case: AwkwardCase) -> None:
    if case.expected:
        rejected = rejection(case.data)
        assert (rejected.code, rejected.stage) == (case.expected, Stage.DECODE), rejected.reason
        assert rejected.reason
        assert len(rejected.reason) < 200
        return
    image = decode_image(case.data, RULE)
    assert image.flags == case.flags
    assert image.pixels_CHW.dtype == torch.uint8
    assert image.pixels_CHW.permute(1, 2, 0).is_contiguous()
    if case.pixels_HWC is not None:
        assert pixels_HWC(image).shape == case.pixels_HWC.shape
        difference = np.abs(pixels_HWC(image).astype(int) - case.pixels_HWC)
        assert difference.max() <= case.tolerance


def test_awkward_files_have_distinct_names_and_cover_every_flag_and_decode_code() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    # A name is none of the decoder's business.
    assert {flag for case in CASES for flag in case.flags} == set(DecodeFlag) - {DecodeFlag.MISNAMED}
    decode_codes = set(RejectCode) - FETCH_CODES - {RejectCode.NOT_FINITE}
    assert {case.expected for case in CASES} - {None} == decode_codes


def test_awkward_folder_holds_the_bytes_of_every_case(tmp_path: Path) -> None:
    cases = write_awkward_folder(tmp_path / "awkward")
    assert {path.name: path.read_bytes() for path in (tmp_path / "awkward").iterdir()} == {
        case.name: case.data for case in cases
    }


def test_reasons_name_what_the_bytes_are() -> None:
    reasons = {case.name: rejection(case.data).reason for case in CASES if case.expected}
    for name, kind in {
        "html.jpg": "HTML",
        "json.jpg": "JSON",
        "svg.jpg": "SVG",
        "pdf.jpg": "PDF",
        "zip.jpg": "zip",
        "gzip.jpg": "gzip",
        "text.jpg": "text",
        "heic.jpg": "HEIC",
        "jpeg_xl.jpg": "JPEG XL",
        "twelve_bit.jpg": "JPEG: 12-bit",
    }.items():
        assert reasons[name] == kind


def test_text_cut_inside_a_character_is_text() -> None:
    assert sniff(b"a" + "ü".encode() * 2000).name == "text"
    assert sniff(b"a\xff\xfe\0" * 1000).name.startswith("unknown bytes")


def test_rejects_survive_pickling() -> None:
    rejected = rejection(b"")
    again = pickle.loads(pickle.dumps(rejected))
    assert (again.code, again.stage, again.reason) == (rejected.code, rejected.stage, rejected.reason)


def test_limits_of_the_rule_hold() -> None:
    png = encode(photo(10, 20), "PNG")
    assert decode_image(png, DecodeRule(max_pixels=200)).pixels_CHW.shape == (3, 10, 20)
    assert rejection(png, DecodeRule(max_pixels=199)).code is RejectCode.TOO_LARGE
    assert rejection(png, DecodeRule(max_bytes=len(png) - 1)).code is RejectCode.TOO_LARGE
    assert decode_image(png, DecodeRule(min_side_px=10)).pixels_CHW.shape == (3, 10, 20)
    assert rejection(png, DecodeRule(min_side_px=11)).code is RejectCode.TOO_SMALL
    assert rejection(png, DecodeRule(formats=(ImageFormat.JPEG,))).code is RejectCode.UNSUPPORTED_FORMAT
    one_pixel = encode(photo(1, 1), "PNG")
    assert decode_image(one_pixel, DecodeRule(min_side_px=1)).pixels_CHW.shape == (3, 1, 1)


def test_transparent_pixels_show_the_background_of_the_rule() -> None:
    clear = encode(np.zeros((4, 4, 4), np.uint8), "PNG")
    image = decode_image(clear, DecodeRule(background_rgb=(1, 2, 3)))
    assert (pixels_HWC(image) == (1, 2, 3)).all()


@pytest.mark.parametrize(
    ("num_bits", "colour_type", "rows", "key"),
    [
        # Two rows of two samples, each behind its filter byte; the key is the first sample.
        (1, 0, b"\0\x80\0\x80", b"\0\1"),
        (2, 0, b"\0\x90\0\x90", b"\0\2"),
        (4, 0, b"\0\xa5\0\xa5", b"\0\x0a"),
        (8, 0, b"\0\xa5\1\0\xa5\1", b"\0\xa5"),
        (16, 0, b"\0\xa5\0\0\1\0\xa5\0\0\1", b"\xa5\0"),
        (8, 2, b"\0\1\2\3\4\5\6" * 2, b"\0\1\0\2\0\3"),
        (16, 2, b"\0\1\7\2\7\3\7\4\7\5\7\6\7" * 2, b"\1\7\2\7\3\7"),
    ],
)
def test_the_one_colour_that_a_png_declares_transparent_shows_the_background(
    num_bits: int, colour_type: int, rows: bytes, key: bytes
) -> None:
    png = png_file((2, 2, num_bits, colour_type), rows, png_chunk(b"tRNS", key))
    image = decode_image(png, DecodeRule(background_rgb=(9, 8, 7)))
    assert (pixels_HWC(image)[:, 0] == (9, 8, 7)).all()
    assert (pixels_HWC(image)[:, 1] != (9, 8, 7)).any()


def test_every_field_of_the_rule_changes_its_digest() -> None:
    others = (
        DecodeRule(max_pixels=1),
        DecodeRule(max_bytes=1),
        DecodeRule(min_side_px=3),
        DecodeRule(background_rgb=(0, 0, 0)),
        DecodeRule(formats=(ImageFormat.PNG,)),
        DecodeRule(version=1),
        DecodeRule(version=2),
        DecodeRule(version=3),
    )
    assert len({digest(rule) for rule in (RULE, *others)}) == 9


def test_png_under_a_jpeg_name_tells_its_real_format() -> None:
    assert decode_image(encode(photo(), "PNG"), RULE).format is ImageFormat.PNG
    assert decode_image(encode(photo(), "JPEG"), RULE).format is ImageFormat.JPEG


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("size", [(375, 500), (33, 47)])
def test_jpeg_pixels_are_pillows(mode: str, progressive: bool, size: tuple[int, int]) -> None:
    jpeg = encode(Image.fromarray(photo(*size)).convert(mode), "JPEG", progressive=progressive)
    expected = np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))
    assert np.array_equal(pixels_HWC(decode_image(jpeg, RULE)), expected)


def test_a_baseline_jpeg_may_have_a_scan_for_each_channel() -> None:
    ycbcr_HWC = np.asarray(Image.fromarray(photo()).convert("YCbCr"))
    jpeg = scan_a_channel(ycbcr_HWC)
    assert jpeg.count(b"\xff\xda") == 3
    difference = pixels_HWC(decode_image(jpeg, RULE)).astype(int) - photo()
    assert np.abs(difference).mean() < 3


def test_markers_that_occur_by_chance_behind_an_image_are_no_scans() -> None:
    jpeg = encode(photo(), "JPEG", progressive=True)
    trailer = b"\xff\xda\x5a" * 1000
    assert np.array_equal(
        pixels_HWC(decode_image(jpeg + trailer + b"\xff\xd9", RULE)), pixels_HWC(decode_image(jpeg, RULE))
    )


@pytest.mark.parametrize(("archive", "count"), [("cifar10-jpeg.tar.gz", 1500), ("imagenet-250.tar", 60)])
def test_real_jpegs_decode_to_pillows_upright_pixels(archive: str, count: int) -> None:
    seen = 0
    for jpeg in archived_jpegs(archive, count):
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(jpeg))).convert("RGB")
        assert np.array_equal(pixels_HWC(decode_image(jpeg, RULE)), np.asarray(expected))
        seen += 1
    assert seen == count


def test_jpegs_decode_alike_without_torchvisions_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    jpegs = [case for case in CASES if sniff(case.data).format is ImageFormat.JPEG]
    monkeypatch.setattr(torch.ops, "image", object())
    for case in jpegs:
        test_awkward_file_gets_its_verdict(case)


def test_memory_that_torch_lacks_to_turn_an_image_is_no_fault_of_the_image(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_memory(*_: object) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch.Tensor, "flip", no_memory)
    with pytest.raises(RuntimeError, match="can't allocate"):
        decode_image(encode(photo(), "PNG", exif=orientation_exif(6)), RULE)


def test_memory_that_lacks_to_read_the_orientation_does_not_leave_the_image_lying(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_memory(_: Image.Image) -> Image.Exif:
        raise MemoryError

    data = encode(photo(), "WEBP", exif=orientation_exif(6))
    monkeypatch.setattr(Image.Image, "getexif", no_memory)
    with pytest.raises(MemoryError):
        decode_image(data, RULE)


def test_a_torchvision_that_cannot_be_imported_is_no_fault_of_the_image(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.io", None)
    with pytest.raises(ImportError):
        decode_image(encode(photo(), "JPEG"), RULE)


def test_threads_decode_alike() -> None:
    files = [case.data for case in CASES if case.expected is None] * 3
    alone = [decode_image(data, RULE).pixels_CHW for data in files]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda data: decode_image(data, RULE).pixels_CHW, files))
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_plain_files_give_no_python_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for image_format in ("JPEG", "PNG", "WEBP", "TIFF"):
            decode_image(encode(photo(), image_format), RULE)


def test_quiet_decoders_keep_stderr_for_python(tmp_path: Path) -> None:
    """The loud run proves that there was something to hide, from C, from Pillow's C and from Pillow."""
    jpeg = encode(photo(), "JPEG")
    tiff = encode(photo(), "TIFF", compression="jpeg")
    (tmp_path / "gap_before_the_end_marker.jpg").write_bytes(jpeg[: len(jpeg) * 6 // 10] + jpeg[-2:])
    (tmp_path / "cut.tif").write_bytes(tiff[:-50])
    (tmp_path / "cut_in_header.tif").write_bytes(encode(photo(), "TIFF")[:100])
    samples_per_pixel = b"\x15\x01\x03\0\x01\0\0\0"
    greedy = encode(photo(), "TIFF").replace(samples_per_pixel + b"\x03", samples_per_pixel + b"\x65")
    (tmp_path / "greedy.tif").write_bytes(greedy)
    code = """
import pathlib, sys
from convoy.core.records import SampleRejected
from convoy.vision.decode_rule import DecodeRule
from convoy.vision.decoding import decode_image, quiet_decoders
if sys.argv[2] == "quiet":
    quiet_decoders()
for path in pathlib.Path(sys.argv[1]).iterdir():
    try:
        decode_image(path.read_bytes(), DecodeRule())
    except SampleRejected:
        pass
print("python speaks", file=sys.stderr)
"""
    loud, quiet = (run_python(code, str(tmp_path), mode) for mode in ("loud", "quiet"))
    for message in ("Corrupt JPEG data", "JPEGLib: ", "UserWarning: ", "More samples per pixel"):
        assert message in loud.stderr
    assert quiet.stderr == "python speaks\n"


def test_bombs_take_no_memory(tmp_path: Path) -> None:
    for case in CASES:
        if "bomb" in case.name:
            (tmp_path / case.name).write_bytes(case.data)
    code = """
import pathlib, resource, sys
from convoy.core.records import SampleRejected
from convoy.vision.decode_rule import DecodeRule
from convoy.vision.decoding import decode_image
from image_files import encode, photo, scan_a_channel
decode_image(encode(photo(), "JPEG"), DecodeRule())
decode_image(encode(photo(), "WEBP"), DecodeRule())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in pathlib.Path(sys.argv[1]).iterdir():
    try:
        decode_image(path.read_bytes(), DecodeRule())
    except SampleRejected:
        print(path.name)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    result = run_python(code, str(tmp_path))
    *names, grown_kib = result.stdout.split()
    assert len(names) == sum("bomb" in case.name for case in CASES) > 5
    assert int(grown_kib) < 20_000


SEEDS = [
    encode(photo(16, 24), "JPEG"),
    encode(photo(16, 24), "JPEG", progressive=True, exif=b"Exif\0\0II*\0\x08\0\0\0\0\0"),
    encode(photo(16, 24), "PNG"),
    encode(photo(16, 24), "GIF"),
    encode(photo(16, 24), "TIFF"),
    encode(photo(16, 24), "WEBP"),
    encode(photo(16, 24), "BMP"),
]


@st.composite
def damaged_files(draw: st.DrawFn) -> bytes:
    data = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(0, 8))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    start = draw(st.integers(0, len(data)))
    cut = draw(st.integers(0, 12))
    del data[start : start + cut]
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)


@settings(max_examples=300, deadline=2000)
@given(damaged_files())
def test_damage_gives_pixels_or_a_reject_and_nothing_else(data: bytes) -> None:
    with suppress(SampleRejected):
        assert decode_image(data, RULE).pixels_CHW.shape[0] == 3


@settings(max_examples=100, deadline=2000)
@given(st.sampled_from(SEEDS[:3]), st.floats(0.3, 1, exclude_max=True))
def test_a_cut_jpeg_or_png_is_never_a_picture(data: bytes, kept: float) -> None:
    assert rejection(data[: int(kept * len(data))]).code in (RejectCode.TRUNCATED, RejectCode.CORRUPT)


@settings(max_examples=100, deadline=2000)
@given(st.integers(0, 10**6), st.integers(1, 255))
def test_a_flipped_png_byte_is_never_a_picture(position: int, flip: int) -> None:
    data = bytearray(SEEDS[2])
    data[position % len(data)] ^= flip
    rejection(bytes(data))
