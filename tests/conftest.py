"""Fixtures that tests of every kind share."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Iterator
from types import SimpleNamespace

import boto3
import pytest
from hypothesis import HealthCheck, settings

from fault_proxy import FaultProxy, running_proxy
from s3_server import OVERRIDING_VARIABLES, S3Server, SwiftCannotRunError, running_server


def pytest_configure() -> None:
    """No test depends on how fast the machine is, nor do Hypothesis' examples."""
    settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("unhurried")


@pytest.fixture
def ample_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk of an image cache of this process has room, however full it is."""
    ample = SimpleNamespace(f_frsize=4096, f_blocks=1 << 30, f_bavail=1 << 30)
    monkeypatch.setattr(os, "fstatvfs", lambda _: ample)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server for the whole session; tests that need it skip where this machine cannot run Swift."""
    try:
        with running_server(tmp_path_factory.mktemp("s3_server")) as server:
            yield server
    except SwiftCannotRunError as error:
        pytest.skip(f"no S3 server: {error}")


@pytest.fixture
def s3_bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a fresh bucket; the environment of the test points at the server."""
    for name in OVERRIDING_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    bucket = f"convoy-{uuid.uuid4().hex}"
    boto3.session.Session().client("s3").create_bucket(Bucket=bucket)
    return bucket


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[dict[str, str]]:
    """A running Ray that jobs share, as the environment that points them at it: saves each job the start."""
    import ray  # noqa: PLC0415 (unit tests need none)

    ray.init("local", include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    yield {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    ray.shutdown()


@pytest.fixture(scope="session")
def fault_proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    """A proxy before the S3 server for the whole session; it spoils nothing but what a test injects."""
    with running_proxy(s3_server) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def s3_behind_proxy(fault_proxy: FaultProxy) -> Iterator[FaultProxy]:
    """The environment of this process, and of all that it starts, points at the S3 server through the proxy."""
    with pytest.MonkeyPatch.context() as patch:
        for name in OVERRIDING_VARIABLES:
            patch.delenv(name, raising=False)
        for name, value in fault_proxy.as_server().environment().items():
            patch.setenv(name, value)
        yield fault_proxy


@pytest.fixture(scope="module")
def ray_behind_proxy(s3_behind_proxy: FaultProxy, ray_cluster: dict[str, str]) -> None:
    """A Ray that is open in this process, whose workers ask the S3 server through the proxy."""
