"""Fixtures of the tests that run jobs on a real Ray."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import ray


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[dict[str, str]]:
    """A running Ray that jobs share, as the environment that points them at it: saves each job the start."""
    ray.init("local", include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    yield {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    ray.shutdown()
