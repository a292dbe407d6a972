"""What Ray Data is told before a job uses it."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from ray._private.log import PlainRayHandler
from ray.data import DataContext
from ray.data._internal.execution.no_progress_guard import NoProgressGuard

from convoy.cluster.ray_data import set_up_ray_data


@pytest.fixture
def context() -> Iterator[DataContext]:
    with DataContext.current(DataContext()):
        yield DataContext.get_current()


def test_a_job_may_wait_for_room_as_long_as_it_takes(context: DataContext) -> None:
    assert NoProgressGuard({}, context.execution_no_progress_timeout_s).enabled
    set_up_ray_data()
    assert not NoProgressGuard({}, context.execution_no_progress_timeout_s).enabled


def test_ray_data_leaves_the_terminal_alone_and_whoever_listens_beside_it_hears_all(
    context: DataContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = logging.StreamHandler()
    logger = logging.getLogger("ray.data")
    (console,) = [handler for handler in logger.handlers if isinstance(handler, PlainRayHandler)]
    monkeypatch.setattr(console, "level", logging.INFO)
    monkeypatch.setattr(logger, "handlers", [console, listener])
    set_up_ray_data()
    assert (console.level, listener.level) == (logging.ERROR, logging.NOTSET)
