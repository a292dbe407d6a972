"""Whether two ways computed the same features of the same images."""

from __future__ import annotations

import numpy as np

from convoy.core.config import StrictModel
from convoy.core.errors import ConvoyError

MIN_COSINE = 0.999
_MIN_CENTRED_COSINE = 0.99


class Equality(StrictModel):
    """How far the features of two ways are apart, at worst over all images.

    `min_centred_cosine` is taken after the mean of all images is subtracted: features of a network with random
    weights have much in common, so that even those of different images have a high cosine.
    """

    num_images: int
    max_abs_difference: float
    min_cosine: float
    min_centred_cosine: float

    @property
    def holds(self) -> bool:
        """Whether rates of the two ways may be compared."""
        return self.min_cosine >= MIN_COSINE and self.min_centred_cosine >= _MIN_CENTRED_COSINE


def compare_features(ours: str, peer: str) -> Equality:
    """Compare two files of `save_features`. Raises ConvoyError if they are not of the same images."""
    with np.load(ours) as one, np.load(peer) as other:
        if not np.array_equal(one["names"], other["names"]):
            raise ConvoyError(
                "the two ways did not give features of the same images", where=f"{ours}, {peer}"
            )
        ours_BD, peer_BD = one["features_BD"], other["features_BD"]
    mean_D = ours_BD.mean(axis=0)
    return Equality(
        num_images=len(ours_BD),
        max_abs_difference=float(np.abs(ours_BD - peer_BD).max()),
        min_cosine=_min_cosine(ours_BD, peer_BD),
        min_centred_cosine=_min_cosine(ours_BD - mean_D, peer_BD - mean_D),
    )


def _min_cosine(one_BD: np.ndarray, other_BD: np.ndarray) -> float:
    norms_B = np.linalg.norm(one_BD, axis=1) * np.linalg.norm(other_BD, axis=1)
    return float(((one_BD * other_BD).sum(axis=1) / norms_B).min())
