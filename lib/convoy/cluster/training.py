"""Training on Ray Train: how many workers with what, and one group of them from the spec to the weights.

Ray is imported inside the functions: a job whose training has ended must not wait for it.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import Field, PositiveInt

from convoy.cluster.growth import has_shrunk, regrow_cluster
from convoy.cluster.library_versions import library_versions, require_versions
from convoy.cluster.nodes import CPUS_LEFT, alive_nodes, worker_nodes
from convoy.cluster.own_node import actor_here
from convoy.cluster.ray_data import first_cause, settle_ray_data
from convoy.cluster.training_board import Board, BoardReader
from convoy.cluster.training_spec import CPUS_A_PREPARER, Ingest, TrainingSpec, object_store_bytes
from convoy.core.config import StrictModel
from convoy.core.errors import (
    ClusterError,
    ClusterLost,
    ConfigError,
    ConvoyError,
    DataError,
    NoRoom,
    VersionMismatch,
)
from convoy.core.training_events import TrainingEvent
from convoy.storage.checkpoints import RAY_TRAIN, CheckpointFolder
from convoy.storage.stores import open_store

# How long the cluster may take to show the resources that are asked for.
_RESOURCES_TIMEOUT_S = 60.0
_POLL_S = 0.5
# With fewer CPUs a GPU, processes of their own would gain little over threads.
_CPUS_A_GPU_TO_SPLIT = 4
# A worker on a GPU whose batches others prepare: one thread for its steps, one that takes the batches.
_THREADS_BESIDE_PREPARERS = 2
_MOST_PREPARERS = 16
# How much of Ray's object store the preparers of all workers may fill, which is also Ray Data's own limit. The rest is
# for the streams that start while theirs end, and for batches on their way to the workers.
_STORE_SHARE = 0.5
# What a group returns in place of an outcome where an earlier one met an error that stays.
_FAILURE = "failure"

Listener = Callable[[TrainingEvent], None]


class WorkerOptions(StrictModel):
    """The training workers. Null means: one a GPU, or without GPUs one, on the node with the most CPUs.

    `cpus_per_worker` are the threads of a worker; `preparers_per_worker` are at most its Ray Data workers under
    the split ingest: fewer where the CPUs do not suffice for those of all workers, null for one a free CPU.
    `max_failures` is how often the group is restarted from the newest checkpoint; if that is a newer one by then, as
    often again.
    """

    num_workers: PositiveInt | None = None
    cpus_per_worker: PositiveInt | None = None
    ingest: Ingest = Ingest.AUTO
    preparers_per_worker: PositiveInt | None = None
    max_failures: int = Field(default=3, ge=0)


class TrialWorkers(WorkerOptions):
    """The workers of a trial, as its search was planned: on GPUs or not, whatever the cluster has at the moment."""

    on_gpus: bool


class WorkerPlan(StrictModel):
    """The workers as the cluster allows them."""

    num_workers: int
    num_threads: int
    cpus_per_worker: float
    gpus_per_worker: int
    ingest: Ingest
    preparers_per_worker: int
    max_failures: int


def plan_workers(
    options: WorkerOptions, *, batch_bytes: int = 0, timeout_s: float = _RESOURCES_TIMEOUT_S
) -> WorkerPlan:
    """How the group is made up (see `fit_workers`); waits for nodes that are still starting.

    Raises NoRoom with the numbers if after `timeout_s` the cluster cannot hold the group, and what `regrow_cluster`
    raises.
    """
    regrow_cluster()
    deadline_s = time.monotonic() + timeout_s
    while True:
        nodes = alive_nodes()
        plan = fit_workers(options, nodes, batch_bytes=batch_bytes)
        if plan is not None:
            return plan
        if time.monotonic() > deadline_s:
            has_gpus = any(node["GPU"] for node in worker_nodes(nodes))
            on_gpus = options.on_gpus if isinstance(options, TrialWorkers) else has_gpus
            wanted = _wanted(options.num_workers or 1, options.cpus_per_worker or 1, on_gpus=on_gpus)
            if options.ingest is Ingest.SPLIT:
                wanted += f" and a preparer of {CPUS_A_PREPARER} CPUs for each"
            raise NoRoom(
                f"the cluster cannot hold {wanted}: after {timeout_s:.0f} s it has {_shown(nodes)}",
                next_step="lower workers.num_workers or workers.cpus_per_worker, or add nodes",
            )
        time.sleep(min(_POLL_S, timeout_s))


def run_training(
    spec: TrainingSpec, plan: WorkerPlan, tell: Listener, check: Callable[[], None]
) -> dict[str, Any]:
    """Train in a group of workers, and return the first worker's TrainingOutcome as JSON-like values.

    The group is restarted from the newest checkpoint when a worker or a node is lost, as soon as the cluster has what
    the environment asks for again, but not for what is wrong with data or config. `tell` hears how far it is, and
    `check`, asked twice a second whether or not there is news, ends the waiting by raising; both in the calling
    thread. Raises the ConvoyError of a worker, NoRoom if none came free for the group, or another ClusterError.
    """
    checkpoints = CheckpointFolder(open_store(spec.workspace), spec.run_id)
    failures_left, reached = plan.max_failures, checkpoints.newest_step()
    while True:
        # What is decided between plan and start takes minutes, a head that is fitted an hour, a new machine a quarter
        # of one: Ray Train waits for four minutes.
        regrow_cluster()
        try:
            return _train_group(spec, plan, tell, check)
        except ClusterError as error:
            before, reached = reached, checkpoints.newest_step()
            if reached > before:
                failures_left = plan.max_failures
            elif not isinstance(error, NoRoom):
                # Ray Train has restarted the group as often.
                failures_left = 0
            # Others that hold the room are not waited for, a machine in the place of a lost one is.
            may_heal = has_shrunk() if isinstance(error, NoRoom) else not isinstance(error, VersionMismatch)
            if not (failures_left and may_heal):
                raise
        failures_left -= 1


def _train_group(
    spec: TrainingSpec, plan: WorkerPlan, tell: Listener, check: Callable[[], None]
) -> dict[str, Any]:
    """What Ray Train makes of the training, with restarts for which it finds room within minutes."""
    board = actor_here(Board).remote()
    trainer = _trainer(spec, plan, board)
    ended: list[Any] = []
    thread = threading.Thread(target=_fit, args=(trainer, plan.ingest, ended), name="train", daemon=True)
    thread.start()
    reader, has_ended = BoardReader(board), False
    while not has_ended:
        thread.join(_POLL_S)
        # Asked before the events are taken: telling them takes time, and the last ones would be missed.
        has_ended = not thread.is_alive()
        check()
        for event in reader.take():
            tell(event)
    (result,) = ended
    if isinstance(result, BaseException):
        raise _explained(result, plan) from result
    if isinstance(failure := result.get(_FAILURE), ConvoyError):
        raise failure
    outcome: dict[str, Any] = result
    return outcome


def _explained(error: BaseException, plan: WorkerPlan) -> ConvoyError:
    """Why the group failed for good: with numbers where the nodes cannot hold it, or others hold them."""
    cause, nodes = first_cause(error), alive_nodes()
    num_slots = _num_slots(nodes, plan.cpus_per_worker, on_gpus=plan.gpus_per_worker > 0)
    if type(cause) not in {ClusterError, ClusterLost}:
        return cause
    wanted = _wanted(plan.num_workers, plan.num_threads, on_gpus=plan.gpus_per_worker > 0)
    if num_slots < plan.num_workers:
        return NoRoom(
            f"the cluster cannot hold {wanted} any more: it has {_shown(nodes)}",
            next_step="add nodes or lower workers.num_workers, and run the same command again to go on",
        )
    if _waited_in_vain(error):
        return NoRoom(
            f"no room came free for {wanted}: the cluster has {_shown(nodes)}, and others use them",
            next_step="run the same command again to go on when other jobs have ended, or add nodes",
        )
    return cause


def _waited_in_vain(error: BaseException) -> bool:
    """Whether Ray Train gave up because it could not reserve what the group needs."""
    from ray.train.v2._internal.exceptions import (  # noqa: PLC0415
        InsufficientClusterResourcesError,
        WorkerGroupStartupTimeoutError,
    )

    failure = getattr(error, "controller_failure", None)
    return isinstance(failure, InsufficientClusterResourcesError | WorkerGroupStartupTimeoutError)


def _fit(trainer: Any, ingest: Ingest, ended: list[Any]) -> None:
    try:
        if ingest is Ingest.SPLIT:
            # Workers would start them on their own nodes, and a node that is lost takes them from all the others.
            settle_ray_data()
        ended.append(trainer.fit().return_value)
    except BaseException as error:
        ended.append(error)


def _trainer(spec: TrainingSpec, plan: WorkerPlan, board: Any) -> Any:
    # Ray Train prints what it does to the driver's terminal, which is ours.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    # How soon Ray Train learns that its workers are done.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(_POLL_S))
    import ray.train  # noqa: PLC0415
    from ray.train.torch import TorchConfig  # noqa: PLC0415

    from convoy.cluster.torch_trainer import KeptTrainer  # noqa: PLC0415

    logging.getLogger("ray.train").setLevel(logging.ERROR)
    return KeptTrainer(
        train_worker,
        train_loop_config={
            "spec": spec.model_dump_json(),
            "board": board,
            "versions": library_versions(),
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=plan.num_workers,
            use_gpu=plan.gpus_per_worker > 0,
            resources_per_worker={
                "CPU": plan.cpus_per_worker,
                **({"GPU": plan.gpus_per_worker} if plan.gpus_per_worker else {}),
            },
        ),
        # A worker alone talks to nobody, and NCCL would look for a device at once.
        torch_config=TorchConfig(backend="nccl" if plan.gpus_per_worker and plan.num_workers > 1 else "gloo"),
        run_config=ray.train.RunConfig(
            # Another name for every start: what is gone on with is decided by our own checkpoints.
            name=f"{spec.run_id}-{secrets.token_hex(4)}",
            storage_path=f"{spec.workspace}/runs/{spec.run_id}/{RAY_TRAIN}",
            failure_config=ray.train.FailureConfig(
                max_failures=plan.max_failures, controller_failure_limit=plan.max_failures
            ),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )


def train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """What Ray Train runs on every worker.

    Ray Train restarts a group after any error. One that another attempt would meet again is left on the board, and
    the restarted group, whose workers all see it there, ends with it at once.
    """
    import ray  # noqa: PLC0415

    from convoy.cluster.lasting_failures import lasting_failure  # noqa: PLC0415
    from convoy.cluster.training_group import TrainingGroup  # noqa: PLC0415
    from convoy.cluster.training_loop import TrainingWorker  # noqa: PLC0415

    spec, board = TrainingSpec.model_validate_json(config["spec"]), config["board"]
    if (failure := ray.get(board.failure.remote())) is not None:
        return {_FAILURE: failure}
    try:
        require_versions(config["versions"])
        return TrainingWorker(spec, TrainingGroup(), board).run().model_dump(mode="json")
    except (ConfigError, DataError, VersionMismatch) as error:
        ray.get(board.give_up.remote(error))
        raise
    except Exception as error:
        failure = lasting_failure(error, spec.run_id)
        if failure is None:
            raise
        ray.get(board.give_up.remote(failure))
        raise failure from error


def _wanted(num_workers: int, num_threads: int, *, on_gpus: bool) -> str:
    return f"{num_workers} workers of {num_threads} CPUs{' and a GPU each' if on_gpus else ''}"


def _shown(nodes: Sequence[Mapping[str, float]]) -> str:
    return ", ".join(f"{node['CPU']:g} CPUs and {node['GPU']:g} GPUs" for node in nodes) or "no node"


def fit_workers(
    options: WorkerOptions,
    nodes: Sequence[Mapping[str, float]],
    *,
    cpus_beside: float = 0.0,
    batch_bytes: int = 0,
) -> WorkerPlan | None:
    """The group on nodes with so many `CPU` and `GPU` each, or None if they cannot hold it.

    `cpus_beside` are CPUs that other processes take, on whichever of the nodes. `batch_bytes` are those of a worker's
    largest batch. An ingest of `auto` is not split where the CPUs, or the `object_store_memory` of the nodes, do not
    suffice for that.
    """
    plan = _fit_group(options, nodes, cpus_beside, batch_bytes)
    if plan is None and options.ingest is Ingest.AUTO:
        fused = options.model_copy(update={"ingest": Ingest.FUSED})
        return _fit_group(fused, nodes, cpus_beside, batch_bytes)
    return plan


def _fit_group(
    options: WorkerOptions, nodes: Sequence[Mapping[str, float]], cpus_beside: float, batch_bytes: int
) -> WorkerPlan | None:
    usable = worker_nodes(nodes)
    num_gpus = int(sum(node["GPU"] for node in usable))
    if isinstance(options, TrialWorkers):
        if options.on_gpus and not num_gpus:
            return None
        num_gpus = num_gpus if options.on_gpus else 0
    hosts = [node for node in usable if node["GPU"] or not num_gpus]
    num_workers = options.num_workers or num_gpus or 1
    ingest = _ingest(options.ingest, usable, hosts, num_gpus)
    if num_gpus and ingest is Ingest.SPLIT:
        num_threads = options.cpus_per_worker or _THREADS_BESIDE_PREPARERS
    else:
        num_threads = options.cpus_per_worker or _threads(
            hosts, num_workers, on_gpus=num_gpus > 0, cpus_beside=cpus_beside
        )
    asked = num_threads - CPUS_LEFT
    if _num_slots(hosts, asked, on_gpus=num_gpus > 0, cpus_beside=cpus_beside) < num_workers:
        return None
    free_cpus = sum(node["CPU"] for node in nodes) - num_workers * asked - cpus_beside
    # Were there more, the preparers of one worker could keep those of another from starting, and it from going on.
    most = int(free_cpus / CPUS_A_PREPARER) // num_workers
    wanted = options.preparers_per_worker or max(1, min(_MOST_PREPARERS, int(free_cpus / num_workers)))
    num_preparers = min(wanted, most)
    if ingest is Ingest.SPLIT and not num_preparers:
        return None
    if options.ingest is Ingest.AUTO and ingest is Ingest.SPLIT:
        room_bytes = _STORE_SHARE * sum(node.get("object_store_memory", 0.0) for node in nodes)
        if num_workers * object_store_bytes(num_preparers, batch_bytes) > room_bytes:
            return None
    return WorkerPlan(
        num_workers=num_workers,
        num_threads=num_threads,
        cpus_per_worker=asked,
        gpus_per_worker=min(1, num_gpus),
        ingest=ingest,
        preparers_per_worker=max(1, num_preparers),
        max_failures=options.max_failures,
    )


def _ingest(
    wanted: Ingest, nodes: Sequence[Mapping[str, float]], hosts: Sequence[Mapping[str, float]], num_gpus: int
) -> Ingest:
    """What `auto` means: a GPU takes more images a second than the threads of one process can prepare."""
    if wanted is not Ingest.AUTO:
        return wanted
    has_helpers = any(not node["GPU"] for node in nodes)
    has_cpus = bool(hosts) and all(node["CPU"] >= _CPUS_A_GPU_TO_SPLIT * node["GPU"] for node in hosts)
    return Ingest.SPLIT if num_gpus and (has_helpers or has_cpus) else Ingest.FUSED


def _threads(
    hosts: Sequence[Mapping[str, float]], num_workers: int, *, on_gpus: bool, cpus_beside: float
) -> int:
    """The most threads that every worker can have without sharing a CPU; 1 where CPUs must be shared."""
    most = max((int(node["CPU"]) for node in hosts), default=1)
    for num_threads in range(most, 1, -1):
        slots = _num_slots(hosts, num_threads, on_gpus=on_gpus)
        reserved = _num_slots(hosts, num_threads - CPUS_LEFT, on_gpus=on_gpus, cpus_beside=cpus_beside)
        if min(slots, reserved) >= num_workers:
            return num_threads
    return 1


def _num_slots(
    nodes: Sequence[Mapping[str, float]], cpus_per_worker: float, *, on_gpus: bool, cpus_beside: float = 0.0
) -> int:
    """How many workers of so many CPUs, and a GPU each, the nodes can hold, wherever the CPUs beside are taken."""
    by_cpus = [int(max(node["CPU"] - cpus_beside, 0) / cpus_per_worker) for node in nodes]
    if not on_gpus:
        return sum(by_cpus)
    return sum(min(most, int(node["GPU"])) for most, node in zip(by_cpus, nodes, strict=True))
