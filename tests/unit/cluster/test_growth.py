from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.autoscaler import sdk
from ray.exceptions import NodeDiedError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

from convoy.cluster import growth, slices, training
from convoy.cluster.growth import (
    CPUS_VARIABLE,
    GPUS_VARIABLE,
    ClusterSize,
    grow_cluster,
    regrow_cluster,
    size_variables,
    wanted_size,
)
from convoy.cluster.slices import plan_pool
from convoy.cluster.training import WorkerOptions, fit_workers, plan_workers, run_training
from convoy.cluster.training_spec import Ingest
from convoy.core.errors import ClusterError, ConfigError, NoRoom, VersionMismatch
from convoy.storage.checkpoints import CheckpointFolder
from convoy.storage.local_store import LocalStore
from made_training import RUN_ID, digit_rows, training_spec


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
    with pytest.raises(NoRoom, match="the cluster has 0 CPUs and 0 GPUs where 1 and 0 are wanted"):
        grow_cluster(ClusterSize(1, 0), timeout_s=0)
    assert asked[-1] == NOTHING


def test_a_cluster_that_is_large_enough_is_asked_for_nothing(
    monkeypatch: pytest.MonkeyPatch, asked: list[dict[str, Any]]
) -> None:
    sees(monkeypatch, ClusterSize(2, 1))
    grow_cluster(ClusterSize(2, 1))
    assert asked == []


ADDRESS = "RAY_ADDRESS"


def test_a_local_ray_is_as_large_as_it_is(
    monkeypatch: pytest.MonkeyPatch, asked: list[dict[str, Any]]
) -> None:
    monkeypatch.delenv(ADDRESS, raising=False)
    monkeypatch.setenv(GPUS_VARIABLE, "8")
    regrow_cluster()
    assert asked == []


def nodes(*sizes: tuple[float, float]) -> list[dict[str, float]]:
    return [{"CPU": cpus, "GPU": gpus, "memory": 1e11} for cpus, gpus in sizes]


HEAD, GPU_NODE = (0.0, 0.0), (8.0, 1.0)


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """The nodes of a cluster whose machine with a GPU has gone, until somebody asks for it."""
    alive = nodes(HEAD)

    def start(bundles: list[dict[str, int]], **_: object) -> None:
        if bundles:
            alive[:] = nodes(HEAD, GPU_NODE)

    monkeypatch.setenv(ADDRESS, "auto")
    monkeypatch.setenv(GPUS_VARIABLE, "1")
    monkeypatch.setattr(sdk, "request_resources", start)
    monkeypatch.setattr(growth.time, "sleep", lambda seconds: None)
    for module in (growth, training, slices):
        monkeypatch.setattr(module, "alive_nodes", lambda: alive)
    return alive


@pytest.mark.parametrize(
    "gpus_planned",
    [lambda: plan_workers(WorkerOptions(), timeout_s=0).gpus_per_worker, lambda: plan_pool(None).num_gpus],
)
@pytest.mark.usefixtures("alive")
def test_machines_that_went_while_the_driver_was_at_work_are_there_again_for_a_plan(
    gpus_planned: Callable[[], float],
) -> None:
    assert gpus_planned() > 0


class _Stopped(Exception):
    """Where Ray Train would begin."""


def test_machines_that_went_between_plan_and_training_are_there_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alive: list[dict[str, float]]
) -> None:
    def start(*_: object) -> None:
        raise _Stopped

    monkeypatch.setattr(training, "actor_here", start)
    plan = fit_workers(WorkerOptions(), nodes(HEAD, GPU_NODE))
    assert plan is not None
    with pytest.raises(_Stopped):
        run_training(
            training_spec(tmp_path, digit_rows(tmp_path, 10)), plan, lambda event: None, lambda: None
        )
    assert alive == nodes(HEAD, GPU_NODE)


class _Trainer:
    """Ray Train in a cluster that loses machines at the first starts: it gives up then, and trains at a later one."""

    def __init__(
        self, alive: list[dict[str, float]], *, num_losses: int, left: list[dict[str, float]]
    ) -> None:
        self._alive, self._num_losses, self._left = alive, num_losses, left
        self.num_starts = 0

    def fit(self) -> SimpleNamespace:
        self.num_starts += 1
        if self.num_starts <= self._num_losses:
            self._alive[:] = self._left
            raise ControllerError(WorkerGroupStartupTimeoutError(1))
        return SimpleNamespace(return_value={"num_nodes": len(self._alive)})


@pytest.fixture
def checkpoints(tmp_path: Path) -> CheckpointFolder:
    """Those of the training."""
    return CheckpointFolder(LocalStore(str(tmp_path)), RUN_ID)


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[_Trainer], dict[str, Any]]:
    """A training in a group of one worker that may be restarted twice."""
    plan = fit_workers(WorkerOptions(ingest=Ingest.FUSED, max_failures=2), nodes(HEAD, GPU_NODE))
    assert plan is not None
    spec = training_spec(tmp_path, digit_rows(tmp_path, 10))

    def run(trainer: _Trainer) -> dict[str, Any]:
        monkeypatch.setattr(training, "_trainer", lambda *_: trainer)
        return run_training(spec, plan, lambda event: None, lambda: None)

    monkeypatch.setattr(training, "actor_here", lambda cls: SimpleNamespace(remote=lambda: None))
    monkeypatch.setattr(training, "BoardReader", lambda board: SimpleNamespace(take=list))
    return run


def test_a_training_that_loses_a_machine_goes_on_with_another_that_takes_longer_than_ray_train_waits(
    train: Callable[[_Trainer], dict[str, Any]], alive: list[dict[str, float]]
) -> None:
    assert train(_Trainer(alive, num_losses=2, left=nodes(HEAD))) == {"num_nodes": 2}


def test_a_training_that_loses_its_machines_again_and_again_ends_and_can_go_on(
    train: Callable[[_Trainer], dict[str, Any]], alive: list[dict[str, float]]
) -> None:
    trainer = _Trainer(alive, num_losses=4, left=nodes(HEAD))
    with pytest.raises(NoRoom, match="cannot hold 1 workers"):
        train(trainer)
    assert trainer.num_starts == 3


def test_a_machine_that_never_comes_is_waited_for_once(
    train: Callable[[_Trainer], dict[str, Any]],
    alive: list[dict[str, float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    num_waits = 0

    def wait_in_vain() -> None:
        nonlocal num_waits
        num_waits += training.has_shrunk()
        if training.has_shrunk():
            raise NoRoom("none joined")

    monkeypatch.setattr(training, "regrow_cluster", wait_in_vain)
    with pytest.raises(NoRoom, match="none joined"):
        train(_Trainer(alive, num_losses=4, left=nodes(HEAD)))
    assert num_waits == 1


class _Spot:
    """Ray Train on machines of which it loses one more than it forgives, again and again, on the way to step 30."""

    def __init__(self, checkpoints: CheckpointFolder, loss: Exception, *, steps_a_start: int) -> None:
        self._checkpoints, self._loss, self._steps_a_start = checkpoints, loss, steps_a_start

    def fit(self) -> SimpleNamespace:
        step = self._checkpoints.newest_step() + self._steps_a_start
        if step >= 30:
            return SimpleNamespace(return_value={"step": step})
        if self._steps_a_start:
            self._checkpoints.write(step, b"weights", details={})
        raise WorkerGroupError("a node was lost", {0: self._loss})


@pytest.mark.parametrize("loss", [RuntimeError("its actor died"), NodeDiedError("its node died")])
@pytest.mark.usefixtures("alive")
def test_a_training_that_comes_further_may_lose_workers_any_number_of_times(
    train: Callable[[_Trainer | _Spot], dict[str, Any]], checkpoints: CheckpointFolder, loss: Exception
) -> None:
    assert train(_Spot(checkpoints, loss, steps_a_start=4)) == {"step": 32}


@pytest.mark.usefixtures("alive")
def test_workers_of_another_version_are_not_tried_again(
    train: Callable[[_Trainer | _Spot], dict[str, Any]], checkpoints: CheckpointFolder
) -> None:
    with pytest.raises(VersionMismatch):
        train(_Spot(checkpoints, VersionMismatch("another torch"), steps_a_start=4))
    assert checkpoints.newest_step() == 4


@pytest.mark.usefixtures("alive")
def test_a_training_that_comes_no_further_is_given_up(
    train: Callable[[_Trainer | _Spot], dict[str, Any]], checkpoints: CheckpointFolder
) -> None:
    spot = _Spot(checkpoints, RuntimeError("its actor died"), steps_a_start=0)
    with pytest.raises(ClusterError, match="a node was lost"):
        train(spot)


def test_a_training_does_not_wait_again_for_what_others_hold(
    train: Callable[[_Trainer], dict[str, Any]], alive: list[dict[str, float]]
) -> None:
    trainer = _Trainer(alive, num_losses=1, left=nodes(HEAD, GPU_NODE))
    with pytest.raises(NoRoom, match="others use them"):
        train(trainer)
    assert trainer.num_starts == 1


def test_a_submission_that_names_gpus_alone_waits_for_no_machine_without() -> None:
    assert size_variables(None, 2) == {CPUS_VARIABLE: "1", GPUS_VARIABLE: "2"}
    assert size_variables(8, 2) == {CPUS_VARIABLE: "8", GPUS_VARIABLE: "2"}
    assert size_variables(8, None) == {CPUS_VARIABLE: "8"}
    assert size_variables(None, 0) == {GPUS_VARIABLE: "0"}
    assert size_variables(None, None) == {}
