"""What a job says where RAY_ADDRESS leads nowhere; Ray itself is not started."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import AuthenticationError

from convoy.cluster.session import ray_session
from convoy.core.errors import ClusterError


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Failed to connect to Ray cluster at 127.0.0.1:6379"),
        ValueError("Invalid address format: 127.0.0.1"),
        AuthenticationError("the token is missing"),
    ],
)
def test_a_cluster_that_does_not_answer_is_an_error_with_a_next_step(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def init(**_: Any) -> None:
        raise error

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    with pytest.raises(ClusterError, match="no Ray answers") as caught, ray_session():
        pytest.fail("there is no session")
    assert "RAY_ADDRESS=127.0.0.1:6379" in caught.value.where
    assert "unset RAY_ADDRESS" in caught.value.next_step


def test_what_a_job_in_the_session_raises_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="127.0.0.1:6379"))
    monkeypatch.setattr("convoy.cluster.session.grow_cluster", lambda size: None)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    with pytest.raises(ConnectionError, match="the store"), ray_session():
        raise ConnectionError("the store went away")


def test_a_ray_that_does_not_start_is_an_error_with_a_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: Any) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ClusterError, match="timed out during startup") as caught, ray_session():
        pytest.fail("there is no session")
    assert "run the same command again" in caught.value.next_step
