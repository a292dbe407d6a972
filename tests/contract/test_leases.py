"""Leases on every store: a local folder, and a real S3 server that knows no compare-and-swap."""

from __future__ import annotations

from pathlib import Path

import pytest

from convoy.core.errors import LeaseHeld, LeaseLost, RunCancelled
from convoy.storage.leases import give_up, hold_run, read_lease
from convoy.storage.local_store import LocalStore
from convoy.storage.runs import RunFolder
from convoy.storage.s3_store import S3Store
from made_leases import put_lease

pytestmark = pytest.mark.integration


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> RunFolder:
    if request.param == "local":
        return RunFolder(LocalStore(str(tmp_path)), "r1")
    return RunFolder(S3Store(request.getfixturevalue("s3_bucket"), "workspace"), "r1")


def test_a_run_has_one_driver_and_the_next_one_a_higher_token(folder: RunFolder) -> None:
    with hold_run(folder, ttl_s=3) as first:
        with pytest.raises(LeaseHeld, match="process "), hold_run(folder):
            pass
        first.confirm()
        assert first.token == 1
    with hold_run(folder) as second:
        assert second.token == 2


def test_a_driver_that_died_elsewhere_is_replaced(folder: RunFolder) -> None:
    put_lease(folder, token=7, ttl_s=1)
    with hold_run(folder) as lease:
        assert lease.token == 8


def test_a_replaced_driver_is_told(folder: RunFolder) -> None:
    with hold_run(folder, ttl_s=60) as lease:
        put_lease(folder, token=2)
        with pytest.raises(LeaseLost, match="elsewhere"):
            lease.confirm()
    left = read_lease(folder)
    assert left is not None
    assert left.token == 2


def test_a_given_up_run_has_no_driver(folder: RunFolder) -> None:
    with hold_run(folder, ttl_s=60) as lease:
        give_up(folder)
        with pytest.raises(RunCancelled):
            lease.confirm()
