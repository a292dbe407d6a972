from __future__ import annotations

from ray.exceptions import RayTaskError
from ray.train import ControllerError, WorkerGroupError

from convoy.cluster.ray_data import first_cause
from convoy.core.errors import ClusterError, DataError


def test_our_own_error_is_found_inside_those_of_ray_train() -> None:
    mine = DataError("no image", where="here")
    inside = RayTaskError("train", "trace", mine)
    assert first_cause(WorkerGroupError("rank 1 failed", {0: ValueError("aborted"), 1: inside})) is mine
    assert first_cause(ControllerError(inside)) is mine


def test_an_error_of_ray_is_told_in_its_own_words() -> None:
    found = first_cause(WorkerGroupError("rank 0 died", {0: ValueError("aborted")}))
    assert type(found) is ClusterError
    assert "rank 0 died" in str(found)
    assert "run the same command again to go on" in str(found)


def test_an_error_without_words_is_named() -> None:
    assert "controller error:\nTimeoutError" in first_cause(ControllerError(TimeoutError())).what
