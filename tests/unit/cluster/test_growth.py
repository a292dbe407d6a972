from __future__ import annotations

import pytest

from convoy.cluster.growth import CPUS_VARIABLE, GPUS_VARIABLE, ClusterSize, wanted_size
from convoy.core.errors import ConfigError


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
