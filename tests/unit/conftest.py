"""Unit tests compare with plain loops on the CPU: a GPU is hidden from them, before torch is asked for one."""

from __future__ import annotations

import os

import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def seeded_torch() -> None:
    """What a test draws without a generator of its own does not depend on the tests that ran before it."""
    import torch  # noqa: PLC0415 (after the GPU is hidden)

    torch.manual_seed(0)
