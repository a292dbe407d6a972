from __future__ import annotations

import pytest
import torch

from convoy.core.errors import DataError
from convoy.vision.weight_files import float32_below
from convoy.vision.weights import read_state_dict, state_to_safetensors

STATE = {
    "backbone.weight": torch.arange(4, dtype=torch.bfloat16),
    "head.weight": torch.tensor([[1.5, -0.0], [torch.inf, 2.0]]),
    "head.scale": torch.tensor(3.0),
    "header": torch.zeros(1),
}


def test_it_keeps_the_very_tensors_below_the_prefix_and_no_others() -> None:
    cut = read_state_dict(float32_below(state_to_safetensors(STATE), "head.", where="here"))
    assert cut.keys() == {"head.weight", "head.scale"}
    assert all(torch.equal(cut[name], STATE[name]) for name in cut)


def test_other_bytes_and_other_types_are_refused() -> None:
    with pytest.raises(DataError, match="no safetensors file"):
        float32_below(b"anything else", "head.", where="here")
    with pytest.raises(DataError, match="BF16, not float32"):
        float32_below(state_to_safetensors(STATE), "backbone.", where="here")
