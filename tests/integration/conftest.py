"""Fixtures of the tests that run jobs on a real Ray."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from s3_server import S3Server


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a benchmark writes its page."""
    return tmp_path_factory.mktemp("bench") / "results.md"


@pytest.fixture(scope="module")
def _s3_environment(s3_server: S3Server) -> Iterator[None]:
    """Workers get their credentials from where Ray was started, as on a cluster."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.environment().items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def ray_on_s3(_s3_environment: None, ray_cluster: dict[str, str]) -> dict[str, str]:
    return ray_cluster
