"""Moments of RGB pixels that add up over parts, and the principal colours they give. Free of torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from pydantic import Field

from convoy.core.config import StrictModel
from convoy.core.records import RejectCode
from convoy.vision.augmentation_policy import PcaBasis

_NUM_CHANNELS = 3
_LEVELS = 255
# Enough for any strength, and few enough that machines whose last bits differ write the same policy.
_DECIMALS = 9


class PixelMoments(StrictModel):
    """Sums over pixels of 0..255: how many, of each channel, and of the products of each pair of channels.

    Whole numbers, so parts give the same whole in any order.
    """

    num_pixels: int = 0
    sums: tuple[int, ...] = (0,) * _NUM_CHANNELS
    products: tuple[tuple[int, ...], ...] = ((0,) * _NUM_CHANNELS,) * _NUM_CHANNELS

    def plus(self, other: PixelMoments) -> PixelMoments:
        """The moments of both parts together."""
        pairs = zip(self.products, other.products, strict=True)
        return PixelMoments(
            num_pixels=self.num_pixels + other.num_pixels,
            sums=_added(self.sums, other.sums),
            products=tuple(_added(mine, theirs) for mine, theirs in pairs),
        )

    def mean(self) -> np.ndarray:
        """The mean colour, float64 of shape (3,), for pixels scaled to 0..1."""
        return np.array([total / (_LEVELS * self.num_pixels) for total in self.sums])

    def covariance(self) -> np.ndarray:
        """The covariance of the channels, float64 of shape (3, 3), for pixels scaled to 0..1."""
        # In whole numbers up to the division: the difference of two large products would lose its digits.
        scale = (_LEVELS * self.num_pixels) ** 2
        rows = [
            [
                (self.num_pixels * product - mine * theirs) / scale
                for product, theirs in zip(row, self.sums, strict=True)
            ]
            for row, mine in zip(self.products, self.sums, strict=True)
        ]
        return np.array(rows)

    def basis(self) -> PcaBasis:
        """The principal components, largest first; the largest entry of each eigenvector is positive."""
        values, vectors = np.linalg.eigh(self.covariance())
        rows = [_signed(np.round(vector, _DECIMALS)) for vector in vectors.T[::-1]]
        eigenvalues = [float(value) for value in np.round(np.maximum(values[::-1], 0), _DECIMALS)]
        return PcaBasis.model_validate({"eigenvalues": eigenvalues, "eigenvectors": rows})


class MeasuredImages(StrictModel):
    """The moments of some images; how many they are, and how many were rejected, by code."""

    moments: PixelMoments = PixelMoments()
    num_images: int = 0
    rejects: dict[RejectCode, int] = Field(default_factory=dict)

    @property
    def num_rejects(self) -> int:
        """Images that do not count."""
        return sum(self.rejects.values())

    def plus(self, other: MeasuredImages) -> MeasuredImages:
        """Both parts together."""
        return MeasuredImages(
            moments=self.moments.plus(other.moments),
            num_images=self.num_images + other.num_images,
            rejects=dict(Counter(self.rejects) + Counter(other.rejects)),
        )


def measure_pixels(pixels_CHW: np.ndarray) -> PixelMoments:
    """The moments of an uint8 image of shape (3, height, width), of less than 10^11 pixels."""
    # Exact: every sum is a whole number below 2^53.
    pixels_CN = pixels_CHW.reshape(_NUM_CHANNELS, -1).astype(np.float64)
    products = (pixels_CN @ pixels_CN.T).astype(np.int64).tolist()
    return PixelMoments(
        num_pixels=pixels_CN.shape[1],
        sums=tuple(pixels_CN.sum(axis=1).astype(np.int64).tolist()),
        products=tuple(tuple(row) for row in products),
    )


def _added(mine: Sequence[int], theirs: Sequence[int]) -> tuple[int, ...]:
    return tuple(left + right for left, right in zip(mine, theirs, strict=True))


def _signed(vector_C: np.ndarray) -> list[float]:
    sign = np.sign(vector_C[np.abs(vector_C).argmax()])
    return [float(entry) for entry in sign * vector_C]
