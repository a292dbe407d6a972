"""The mean of a network's outputs over views, as the committee engine takes it, on stored predictions."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from convoy.core.crop_policies import Averaging


def mean_of_views(
    logits_VNK: NDArray[Any], averaging: Averaging, temperature: float = 1.0
) -> NDArray[np.float64]:
    """Logits_NK of the views' mean at a temperature; log-probabilities where probabilities are averaged."""
    wide_VNK = np.asarray(logits_VNK).astype(np.float64) / temperature
    if averaging is Averaging.LOGITS:
        return np.asarray(wide_VNK.mean(axis=0))
    wide_VNK -= wide_VNK.max(axis=2, keepdims=True)
    probabilities_VNK = np.exp(wide_VNK)
    probabilities_VNK /= probabilities_VNK.sum(axis=2, keepdims=True)
    return np.asarray(np.log(np.maximum(probabilities_VNK.mean(axis=0), np.finfo(np.float64).tiny)))
