from __future__ import annotations

import numpy as np
import pytest

from convoy.core.crop_policies import Averaging
from convoy.vision.ensembling import mean_of_views

LOGITS_VNK = np.random.default_rng(0).normal(0, 3, (5, 7, 4)).astype(np.float32)


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits.astype(np.float64))
    return np.asarray(exponentials / exponentials.sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_probabilities_are_averaged_after_the_temperature(temperature: float) -> None:
    found_NK = np.exp(mean_of_views(LOGITS_VNK, Averaging.PROBABILITIES, temperature))
    np.testing.assert_allclose(found_NK, softmax(LOGITS_VNK / temperature).mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(found_NK.sum(axis=1), 1)


def test_the_mean_of_logits_is_the_normalised_geometric_mean() -> None:
    found_NK = softmax(mean_of_views(LOGITS_VNK, Averaging.LOGITS))
    geometric_NK = np.exp(np.log(softmax(LOGITS_VNK)).mean(axis=0))
    np.testing.assert_allclose(found_NK, geometric_NK / geometric_NK.sum(axis=1, keepdims=True), rtol=1e-6)


def test_huge_logits_stay_finite() -> None:
    found_NK = mean_of_views(LOGITS_VNK * 1e4, Averaging.PROBABILITIES)
    assert np.isfinite(found_NK).all()
    np.testing.assert_array_equal(LOGITS_VNK[0].dtype, np.float32)
