from __future__ import annotations

import numpy as np
import pytest
from PIL import ExifTags, Image

from convoy.core.records import RejectCode, SampleRejected
from convoy.vision.decode_rule import DecodeFlag, DecodeRule
from convoy.vision.decoding import DecodedImage, decode_image
from image_files import ByteOrder, encode, tiff_file

RULE = DecodeRule()


def pixels_HWC(image: DecodedImage) -> np.ndarray:
    return image.pixels_CHW.permute(1, 2, 0).numpy()


def test_sixteen_bit_grey_that_counts_from_white_is_no_negative() -> None:
    levels_HW = np.linspace(0, 65535, 48 * 64).astype(np.uint16).reshape(48, 64)
    data = encode(Image.fromarray(levels_HW), "TIFF", tiffinfo={ExifTags.Base.PhotometricInterpretation: 0})
    image = decode_image(data, RULE)
    assert np.array_equal(pixels_HWC(image)[..., 0], 255 - (levels_HW >> 8))
    assert image.flags == {DecodeFlag.GREY_EXPANDED, DecodeFlag.SIXTEEN_BIT_SCALED}


def test_models_of_the_first_version_of_the_rule_see_what_they_were_trained_on() -> None:
    levels_HW = np.linspace(0, 65535, 48 * 64).astype(np.uint16).reshape(48, 64)
    data = encode(Image.fromarray(levels_HW), "TIFF", tiffinfo={ExifTags.Base.PhotometricInterpretation: 0})
    negative = decode_image(data, DecodeRule(version=1))
    assert np.array_equal(pixels_HWC(negative)[..., 0], levels_HW >> 8)


def tiff_of_planes(
    planes_CHW: np.ndarray, photometric: int, byte_order: ByteOrder = "<", **tags: int
) -> bytes:
    """A TIFF whose channels lie apart, of samples of their type."""
    num_planes, height_px, width_px = planes_CHW.shape
    samples = planes_CHW.astype(planes_CHW.dtype.newbyteorder(byte_order))
    return tiff_file(
        {
            256: width_px,
            257: height_px,
            258: 8 * planes_CHW.itemsize,
            262: photometric,
            277: num_planes,
            278: height_px,
            284: 2,
            **{int(tag.removeprefix("tag_")): value for tag, value in tags.items()},
        },
        [plane.tobytes() for plane in samples],
        byte_order,
    )


@pytest.mark.parametrize("byte_order", ["<", ">"])
def test_sixteen_bit_colours_in_separate_planes_are_their_upper_bits(byte_order: ByteOrder) -> None:
    levels_CHW = np.random.default_rng(0).integers(0, 1 << 16, (3, 5, 7), np.uint16)
    data = tiff_of_planes(levels_CHW, 2, byte_order)
    image = decode_image(data, RULE)
    assert np.array_equal(image.pixels_CHW.numpy(), levels_CHW >> 8)
    assert image.flags == {DecodeFlag.SIXTEEN_BIT_SCALED}
    noise = decode_image(data, DecodeRule(version=3))
    assert not np.array_equal(noise.pixels_CHW.numpy(), levels_CHW >> 8)


@pytest.mark.parametrize(("dtype", "shift"), [(np.uint8, 0), (np.uint16, 8)])
@pytest.mark.parametrize("white_is_zero", [False, True])
def test_one_channel_may_be_declared_a_separate_plane(
    dtype: type[np.unsignedinteger], shift: int, white_is_zero: bool
) -> None:
    levels_HW = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (5, 7), dtype)
    image = decode_image(tiff_of_planes(levels_HW[None], 0 if white_is_zero else 1), RULE)
    shown_HW = (~levels_HW if white_is_zero else levels_HW) >> shift
    assert np.array_equal(pixels_HWC(image)[..., 0], shown_HW)


def test_planes_that_pillow_would_misread_are_rejected() -> None:
    planes = np.zeros((4, 5, 7), np.uint16)
    for data in (tiff_of_planes(planes, 5), tiff_of_planes(planes[:3].astype(np.uint8), 2, tag_266=2)):
        with pytest.raises(SampleRejected, match="in separate planes") as caught:
            decode_image(data, RULE)
        assert caught.value.code is RejectCode.UNSUPPORTED_FORMAT


def test_eight_bit_colours_may_lie_in_separate_planes() -> None:
    levels_CHW = np.random.default_rng(0).integers(0, 256, (3, 5, 7), np.uint8)
    image = decode_image(tiff_of_planes(levels_CHW, 2), RULE)
    assert np.array_equal(image.pixels_CHW.numpy(), levels_CHW)


def twelve_bit_tiff(levels_HW: np.ndarray) -> bytes:
    """Grey levels up to 4095, two of them in three bytes."""
    first, second = (half.astype(np.uint32) for half in (levels_HW[:, ::2], levels_HW[:, 1::2]))
    packed = (first << 12 | second).astype(">u4").view(np.uint8).reshape(*first.shape, 4)[..., 1:].tobytes()
    height_px, width_px = levels_HW.shape
    return tiff_file({256: width_px, 257: height_px, 258: 12, 262: 1, 277: 1, 278: height_px}, [packed])


def test_twelve_bit_grey_has_its_whole_range() -> None:
    levels_HW = np.linspace(0, 4095, 48 * 64).astype(np.uint16).reshape(48, 64)
    data = twelve_bit_tiff(levels_HW)
    assert np.array_equal(pixels_HWC(decode_image(data, RULE))[..., 0], levels_HW >> 4)
    almost_black = decode_image(data, DecodeRule(version=2))
    assert np.array_equal(pixels_HWC(almost_black)[..., 0], levels_HW >> 8)
