from __future__ import annotations

import pytest
from ray.exceptions import LocalRayletDiedError, NodeDiedError, RayError, RayTaskError, RpcError
from ray.train import ControllerError, WorkerGroupError

from convoy.cluster.ray_data import first_cause
from convoy.core.errors import ClusterError, ClusterLost, DataError


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


@pytest.mark.parametrize("lost", [LocalRayletDiedError(), NodeDiedError("gone"), RpcError("no answer")])
def test_a_cluster_that_is_gone_is_told_from_a_worker_that_failed(lost: RayError) -> None:
    assert type(first_cause(lost)) is ClusterLost
    assert type(first_cause(ControllerError(lost))) is ClusterLost


def test_an_error_without_words_is_named() -> None:
    assert "controller error:\nTimeoutError" in first_cause(ControllerError(TimeoutError())).what
