from __future__ import annotations

from typing import Any

import pytest
from ray.autoscaler import sdk

from convoy.cluster import growth
from convoy.cluster.growth import CPUS_VARIABLE, GPUS_VARIABLE, ClusterSize, grow_cluster, wanted_size
from convoy.core.errors import ClusterError, ConfigError


@pytest.fixture(autouse=True)
def _no_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (CPUS_VARIABLE, GPUS_VARIABLE):
        monkeypatch.delenv(name, raising=False)


def test_a_job_wants_a_cpu_if_nothing_is_said() -> None:
    assert wanted_size() == ClusterSize(1, 0)


def test_the_environment_says_how_large_the_cluster_is_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CPUS_VARIABLE, "64")
    monkeypatch.setenv(GPUS_VARIABLE, "4")
    assert wanted_size() == ClusterSize(64, 4)


@pytest.mark.parametrize("text", ["", "many", "-1", "1.5"])
def test_what_is_no_number_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(GPUS_VARIABLE, text)
    with pytest.raises(ConfigError, match=GPUS_VARIABLE):
        wanted_size()


def test_gpus_do_not_stand_for_cpus() -> None:
    assert not ClusterSize(1, 8).covers(ClusterSize(2, 1))
    assert ClusterSize(2, 1).covers(ClusterSize(2, 1))


NOTHING = {"num_cpus": 0, "bundles": []}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the autoscaler is asked for."""
    requests: list[dict[str, Any]] = []
    monkeypatch.setattr(sdk, "request_resources", lambda **request: requests.append(request))
    monkeypatch.setattr(growth.time, "sleep", lambda seconds: None)
    return requests


def sees(monkeypatch: pytest.MonkeyPatch, *sizes: ClusterSize) -> None:
    """The cluster as it is each time that it is looked at."""
    seen = iter(sizes)
    monkeypatch.setattr(growth, "_size", lambda: next(seen))


def test_a_request_is_repeated_while_it_is_waited_for_and_then_taken_back(
    monkeypatch: pytest.MonkeyPatch, asked: list[dict[str, Any]]
) -> None:
    """Others replace it: the cluster has only one."""
    sees(monkeypatch, *[ClusterSize(0, 0)] * 4, ClusterSize(2, 1))
    grow_cluster(ClusterSize(2, 1))
    assert asked == [*[{"num_cpus": 2, "bundles": [{"GPU": 1}]}] * 3, NOTHING]


def test_a_request_in_vain_is_taken_back(
    monkeypatch: pytest.MonkeyPatch, asked: list[dict[str, Any]]
) -> None:
    sees(monkeypatch, *[ClusterSize(0, 0)] * 4)
    with pytest.raises(ClusterError, match="the cluster has 0 CPUs and 0 GPUs where 1 and 0 are wanted"):
        grow_cluster(ClusterSize(1, 0), timeout_s=0)
    assert asked[-1] == NOTHING


def test_a_cluster_that_is_large_enough_is_asked_for_nothing(
    monkeypatch: pytest.MonkeyPatch, asked: list[dict[str, Any]]
) -> None:
    sees(monkeypatch, ClusterSize(2, 1))
    grow_cluster(ClusterSize(2, 1))
    assert asked == []
