"""What Ray Data is told before a job uses it."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from ray.data import DataContext
from ray.data._internal.execution.no_progress_guard import NoProgressGuard

from convoy.cluster.ray_data import set_up_ray_data


@pytest.fixture
def context() -> Iterator[DataContext]:
    with DataContext.current(DataContext.get_current().copy()):
        yield DataContext.get_current()


def test_a_job_may_wait_for_room_as_long_as_it_takes(
    context: DataContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    # During a test those of pytest are among its handlers, and what it quiets stays quiet.
    monkeypatch.setattr(logging.getLogger("ray.data"), "handlers", [])
    assert NoProgressGuard({}, context.execution_no_progress_timeout_s).enabled
    set_up_ray_data()
    assert not NoProgressGuard({}, context.execution_no_progress_timeout_s).enabled
