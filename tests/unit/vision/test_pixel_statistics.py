from __future__ import annotations

import numpy as np
import pytest
import torch

from convoy.core.records import RejectCode
from convoy.vision.cropping import central_square
from convoy.vision.pixel_statistics import MeasuredImages, PixelMoments, measure_pixels
from image_files import photo


def images_CHW(number: int) -> list[np.ndarray]:
    return [photo(20 + seed, 30, seed).transpose(2, 0, 1) for seed in range(number)]


def total(images: list[np.ndarray]) -> PixelMoments:
    moments = PixelMoments()
    for image_CHW in images:
        moments = moments.plus(measure_pixels(image_CHW))
    return moments


def test_parts_add_up_to_numpys_mean_and_covariance() -> None:
    images = images_CHW(6)
    pixels_CN = np.concatenate([image.reshape(3, -1) for image in images], axis=1) / 255
    moments = total(images)
    assert np.allclose(moments.mean(), pixels_CN.mean(axis=1), rtol=1e-12)
    assert np.allclose(moments.covariance(), np.cov(pixels_CN, bias=True), rtol=1e-12)


def test_order_of_the_parts_does_not_matter_to_the_last_bit() -> None:
    images = images_CHW(6)
    assert total(images) == total(images[::-1])
    assert total(images).basis() == total(images[::-1]).basis()


def test_moments_of_very_many_pixels_keep_their_digits() -> None:
    """10^9 pixels of nearly one colour: in floats the difference of the products would be noise."""
    part = PixelMoments(num_pixels=1, sums=(200, 200, 200), products=((40_000,) * 3,) * 3)
    other = PixelMoments(num_pixels=1, sums=(201, 201, 201), products=((40_401,) * 3,) * 3)
    many = 5 * 10**8
    moments = PixelMoments(
        num_pixels=2 * many,
        sums=tuple(many * (left + right) for left, right in zip(part.sums, other.sums, strict=True)),
        products=((many * 80_401,) * 3,) * 3,
    )
    assert moments.covariance() == pytest.approx(np.full((3, 3), 0.25 / 255**2), rel=1e-12)


def test_basis_is_the_sorted_eigendecomposition_with_fixed_signs() -> None:
    moments = total(images_CHW(4))
    basis = moments.basis()
    values, vectors = np.array(basis.eigenvalues), np.array(basis.eigenvectors)
    assert (np.diff(values) <= 0).all()
    assert np.allclose(vectors.T @ np.diag(values) @ vectors, moments.covariance(), atol=1e-8)
    assert np.allclose(vectors @ vectors.T, np.eye(3), atol=1e-8)
    assert all(vector[np.abs(vector).argmax()] > 0 for vector in vectors)


def test_one_colour_has_no_principal_colours() -> None:
    assert measure_pixels(np.full((3, 4, 4), 77, np.uint8)).basis().eigenvalues == (0, 0, 0)


def test_measured_images_add_up_with_their_rejects() -> None:
    part = MeasuredImages(
        moments=measure_pixels(images_CHW(1)[0]), num_images=1, rejects={RejectCode.EMPTY: 2}
    )
    other = MeasuredImages(rejects={RejectCode.EMPTY: 1, RejectCode.CORRUPT: 1})
    both = part.plus(other)
    assert (both.num_images, both.num_rejects) == (1, 4)
    assert both.rejects == {RejectCode.EMPTY: 3, RejectCode.CORRUPT: 1}
    assert MeasuredImages.model_validate_json(both.model_dump_json()) == both


def test_central_square_is_shrunk_but_never_enlarged() -> None:
    wide = torch.from_numpy(photo(20, 30)).permute(2, 0, 1)
    assert torch.equal(central_square(wide, 256), wide[:, :, 5:25])
    assert central_square(wide, 16).shape == (3, 16, 16)
