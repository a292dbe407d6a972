"""Slices through Ray Data: one row a slice, one pool of fused operators, one record back for each.

Ray is imported inside the functions: a job that finds nothing to do must not wait for it.
"""

from __future__ import annotations

import pickle
import secrets
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

from convoy.cluster.deadly_slices import DeathWatch, ImageTrials
from convoy.cluster.growth import regrow_cluster
from convoy.cluster.library_versions import library_versions, require_versions
from convoy.cluster.nodes import CPUS_LEFT, alive_nodes, worker_nodes
from convoy.cluster.ray_data import first_cause, set_up_ray_data
from convoy.cluster.slice_metrics import SliceMetrics
from convoy.core.config import StrictModel
from convoy.core.errors import ClusterError, ConvoyError
from convoy.core.processes import keep_freed_memory
from convoy.storage.commits import SliceRecord

_CPUS_AN_OPERATOR = 4
_MOST_OPERATORS_A_GPU = 4
# Without GPUs: what a process takes beside the weights of its networks, which it may hold twice, the second time as
# kernels want them, and the rows, or the seconds of two cores in networks, that make up for its start.
_MEMORY_AN_OPERATOR_BYTES = 2 << 30
_COPIES_OF_WEIGHTS = 2
_ROWS_AN_OPERATOR = 1000
_FORWARD_S_AN_OPERATOR = 8.0
_AFTER_DEATHS_AT_START = (
    "most likely the memory is too small for the network (use fewer workers: extraction.num_workers, or larger nodes);"
    " the worker's log in Ray's session folder may say more; then run the same command again, finished slices are kept"
)
_AFTER_A_DEADLY_SLICE = (
    "no single image of it does so: most likely the memory is too small (use fewer workers: extraction.num_workers), or"
    " a mounted folder does not answer;"
    " where a worker's log in Ray's session folder ends with `Timeout` and stacks, they say what it waited for;"
    " then run the same command again, finished slices are kept"
)


class WorkerPool(StrictModel):
    """How many operators run, what each of them holds of the cluster, and the threads it may use."""

    num_workers: int
    num_cpus: float
    num_gpus: float
    num_threads: int

    @property
    def num_decode_threads(self) -> int:
        """Beside the thread that feeds the network; none where both would share one core."""
        return self.num_threads if self.num_gpus or self.num_threads > 1 else 0


class PlannedWork(NamedTuple):
    """What a pool is to do: so many rows, by networks of so many bytes, in so many slices if that is known.

    `forward_s` is the forecast of the seconds in the networks, as if two cores did it all.
    """

    num_rows: int = 0
    weights_bytes: int = 0
    num_slices: int | None = None
    forward_s: float = 0.0


_NO_WORK = PlannedWork()


class SliceTask(StrictModel):
    """One row through Ray Data: which slice, and the ids of the outputs that it is to write."""

    slice: str
    outputs: tuple[str, ...]


class NodeSize(NamedTuple):
    """What a node that can hold operators offers to them."""

    cpus: int
    gpus: int = 0
    memory_bytes: int = 0


def plan_pool(
    num_workers: int | None, cpus_per_worker: int | None = None, work: PlannedWork = _NO_WORK
) -> WorkerPool:
    """The pool for some work on the cluster, which has what the environment asks for.

    Raises ClusterError where no node offers a CPU, and what `regrow_cluster` raises.
    """
    regrow_cluster()
    usable = worker_nodes(alive_nodes())
    if not usable:
        raise ClusterError("no node offers a CPU", next_step="start workers, or look at `ray status`")
    nodes = [NodeSize(int(node["CPU"]), int(node["GPU"]), int(node["memory"])) for node in usable]
    return fit_pool(num_workers, nodes, cpus_per_worker, work)


def fit_pool(
    num_workers: int | None,
    nodes: Sequence[NodeSize],
    cpus_per_worker: int | None = None,
    work: PlannedWork = _NO_WORK,
) -> WorkerPool:
    """Operators for these nodes; unless their number is given, the CPUs are shared out as threads.

    Without GPUs one a node, and for much work one a CPU. With GPUs one for every four CPUs beside a GPU, and at most
    four share it: one process cannot decode as fast as a GPU computes, because its threads share Python's lock. For few
    slices there are fewer, as many on each GPU: Ray would put what is left of a full pool on the first ones.
    """
    num_gpus = sum(node.gpus for node in nodes)
    if not num_gpus:
        workers = num_workers or _operators_without_gpus(nodes, cpus_per_worker or 1, work)
        num_threads = cpus_per_worker or max(sum(node.cpus for node in nodes) // workers, 1)
        if num_workers is None:
            num_cpus = _cpus_of_counted(nodes, num_threads)
        else:
            # As many as were asked for, and as the workers of a trial have in whose place they come.
            num_cpus = min(num_threads, *(node.cpus for node in nodes)) - CPUS_LEFT
        return WorkerPool(num_workers=workers, num_cpus=num_cpus, num_gpus=0, num_threads=num_threads)
    cpus_a_gpu = min(node.cpus // node.gpus for node in nodes if node.gpus)
    share = min(max(cpus_a_gpu // _CPUS_AN_OPERATOR, 1), _MOST_OPERATORS_A_GPU)
    if work.num_slices is not None:
        share = min(share, max(work.num_slices // num_gpus, 1))
    workers = num_workers or num_gpus * share
    on_one_gpu = -(-workers // num_gpus)
    return WorkerPool(
        num_workers=workers,
        num_cpus=0.25,
        num_gpus=1 / on_one_gpu,
        num_threads=cpus_per_worker or max(cpus_a_gpu // on_one_gpu, 1),
    )


def _operators_without_gpus(nodes: Sequence[NodeSize], cpus_each: int, work: PlannedWork) -> int:
    """One a node, or as many as CPUs and memory hold, if there is work enough to make up for their start.

    The threads of one network wait for each other: while a decoder has one of their cores, all of them stand still.
    """
    memory_bytes = _MEMORY_AN_OPERATOR_BYTES + _COPIES_OF_WEIGHTS * work.weights_bytes
    most = sum(max(min(node.cpus // cpus_each, node.memory_bytes // memory_bytes), 1) for node in nodes)
    paid_for = max(work.num_rows // _ROWS_AN_OPERATOR, int(work.forward_s // _FORWARD_S_AN_OPERATOR))
    wanted = paid_for if work.num_slices is None else min(paid_for, work.num_slices)
    return max(len(nodes), min(most, wanted))


def _cpus_of_counted(nodes: Sequence[NodeSize], num_threads: int) -> float:
    """What each of them reserves: on nodes of one size so much that none takes more of them than it has memory for.

    Else one node would take all operators of another that is lost. All of them fit, and leave something of each node.
    """
    return min((node.cpus - CPUS_LEFT) / max(node.cpus // num_threads, 1) for node in nodes)


class SliceSpec(Protocol):
    """What all specs of operators have in common."""

    @property
    def run_id(self) -> str:
        """The run whose slices are done."""
        ...

    def model_dump_json(self) -> str:
        """The spec as JSON, for the workers."""
        ...


class SliceOperator(Protocol):
    """What runs in a worker: made once from its spec, then called for each slice."""

    def __call__(self, task: SliceTask, trials: ImageTrials | None = None) -> SliceRecord:
        """Do a slice, and write the record that makes it count. With `trials` its images are tried alone first."""
        ...


class OperatorFactory(Protocol):
    """Makes an operator in a worker, where torch may be imported: the driver plans and counts without it."""

    def __call__(self, spec_json: str) -> SliceOperator:
        """The operator for a spec."""
        ...


def run_slices(
    factory: OperatorFactory, spec: SliceSpec, tasks: Sequence[SliceTask], pool: WorkerPool, *, verb: str
) -> Iterator[SliceRecord]:
    """The records of the tasks' slices, in the order in which they finish; metrics count them under the verb.

    A worker that dies is replaced and its slice redone. If that ends one worker after another, the image that does it
    becomes a reject; where it is no image, and where a worker raises an error, the run ends. Finished slices stay.
    """
    import ray.data  # noqa: PLC0415
    from ray.exceptions import RayError  # noqa: PLC0415

    set_up_ray_data()
    metrics = SliceMetrics(verb, spec.run_id, num_slices=len(tasks))
    rows = [{"task": task.model_dump_json()} for task in tasks]
    # A block a slice: slices are handed out one by one, and a record comes back as soon as its slice is done.
    num_workers = min(pool.num_workers, len(rows))
    # While a worker does a slice, Ray holds the next one ready there: of few slices, one that another worker lacks.
    ahead = 1 if len(rows) < 2 * num_workers else None
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        SliceWorker,
        fn_constructor_args=(factory, spec.model_dump_json(), secrets.token_hex(8), library_versions()),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=num_workers, max_tasks_in_flight_per_actor=ahead),
        num_cpus=pool.num_cpus,
        num_gpus=pool.num_gpus,
    )
    try:
        for row in dataset.iter_rows():
            if row["error"]:
                raise pickle.loads(row["error"])
            record = SliceRecord.model_validate_json(row["record"])
            metrics.add(record)
            yield record
    except RayError as error:
        raise first_cause(error) from error


class SliceWorker:
    """The actor that Ray Data makes for each place in the pool.

    Our own errors come back as rows: of what a worker raises, Ray Data passes on no more than the text.
    """

    def __init__(
        self, factory: OperatorFactory, spec_json: str, token: str, versions: Mapping[str, str]
    ) -> None:
        self._watch = DeathWatch(token, kind="slice", next_step=_AFTER_A_DEADLY_SLICE)
        keep_freed_memory()
        # Ray makes an actor in one thread and calls it in another; torch's threads work for one, see `use_threads`.
        self._thread = ThreadPoolExecutor(1, "operator")
        self._operator: SliceOperator | ConvoyError
        try:
            require_versions(versions)
            with self._watch.starting(_AFTER_DEATHS_AT_START):
                self._operator = self._thread.submit(factory, spec_json).result()
        except ConvoyError as error:
            self._operator = error

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """The records of a batch of tasks as JSON, or the error that ended them, pickled."""
        try:
            records = [self._do(SliceTask.model_validate_json(str(text))) for text in batch["task"]]
        except ConvoyError as error:
            return {"record": [""], "error": [pickle.dumps(error)]}
        return {
            "record": [record.model_dump_json() for record in records],
            "error": [b""] * len(records),
        }

    def _do(self, task: SliceTask) -> SliceRecord:
        if isinstance(self._operator, ConvoyError):
            raise self._operator
        with self._watch.watching(task.slice) as trials:
            return self._thread.submit(self._operator, task, trials).result()
