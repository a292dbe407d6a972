"""What the networks of a job run on is what its workers have, not its driver."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import GetTimeoutError

from convoy.cluster import network_device
from convoy.cluster.network_device import find_device, known_device, supposed_gpu
from convoy.vision.engine_options import Precision, device_here
from made_devices import made_device

H100 = made_device()
HEAD = {"CPU": 0.0, "GPU": 0.0}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """With what workers are asked, on a cluster whose head has no CPU for tasks; they answer that they have an H100."""
    options: list[dict[str, Any]] = []

    def remote(**given: Any) -> Any:
        options.append(given)
        return lambda function: SimpleNamespace(remote=lambda: function)

    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(network_device, "ray_session", nullcontext)
    monkeypatch.setattr(network_device, "regrow_cluster", lambda: None)
    monkeypatch.setattr(ray, "remote", remote)
    monkeypatch.setattr(ray, "get", lambda answer, timeout: H100)
    return options


def has_nodes(monkeypatch: pytest.MonkeyPatch, *nodes: dict[str, float]) -> None:
    monkeypatch.setattr(network_device, "alive_nodes", lambda: [HEAD, *nodes])


def test_without_a_cluster_it_is_that_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert known_device() == find_device() == device_here()


def test_of_a_cluster_nobody_knows_it_without_asking(asked: list[dict[str, Any]]) -> None:
    assert known_device() is None
    assert not asked


def test_a_worker_with_a_gpu_is_asked_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, asked: list[dict[str, Any]]
) -> None:
    has_nodes(monkeypatch, {"CPU": 16.0, "GPU": 0.0}, {"CPU": 8.0, "GPU": 1.0})
    # Its own idea of the CPUs may be that of a host around its container.
    assert find_device() == H100.model_copy(update={"num_cpus": 16})
    (options,) = asked
    assert 0 < options["num_gpus"] < 0.1
    assert options["num_cpus"] == 0


def test_without_gpus_a_node_that_works_is_asked_and_not_a_head_that_only_drives(
    monkeypatch: pytest.MonkeyPatch, asked: list[dict[str, Any]]
) -> None:
    # Nor one whose GPU no worker can use.
    has_nodes(monkeypatch, {"CPU": 16.0, "GPU": 0.0}, {"CPU": 0.0, "GPU": 1.0})
    assert find_device() == H100.model_copy(update={"num_cpus": 16})
    (options,) = asked
    assert 0 < options["num_cpus"] < 0.1
    assert "num_gpus" not in options


@pytest.mark.usefixtures("asked")
def test_gpus_that_are_all_taken_are_judged_by_their_type(monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled: list[object] = []

    def get(answer: object, timeout: float) -> None:
        raise GetTimeoutError

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "cancel", cancelled.append)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 8.0, "accelerator_type:T4": 2.0})
    has_nodes(monkeypatch, {"CPU": 8.0, "GPU": 8.0})
    device = find_device()
    assert (device.is_gpu, device.precision, device.has_compiler) == (True, Precision.FP32, None)
    assert "T4" in device.name
    assert "none was free to be asked" in device.name
    # What waits in Ray's queue would have an autoscaler start a machine.
    assert len(cancelled) == 1


@pytest.mark.parametrize(
    ("types", "precision"),
    [
        (["H100"], Precision.BF16),
        (["A10G", "L4"], Precision.BF16),
        (["V100"], Precision.FP32),
        (["A100", "T4"], Precision.FP32),
        ([], Precision.BF16),
    ],
)
def test_a_gpu_is_supposed_to_have_bf16_unless_one_of_the_types_is_older(
    types: list[str], precision: Precision
) -> None:
    assert supposed_gpu(types).precision is precision
