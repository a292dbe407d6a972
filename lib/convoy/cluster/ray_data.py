"""What every job on Ray Data does alike: leave the terminal alone, and say what went wrong in our own words."""

from __future__ import annotations

import logging
from typing import Any

from convoy.core.errors import ClusterError, ClusterLost, ConvoyError

# By which Ray Data's guard against executions without progress is switched off.
_NO_LIMIT = -1
# What Ray Data calls its handler that writes to the terminal.
_CONSOLE = "console"


def set_up_ray_data() -> None:
    """Ray Data leaves the terminal to our own progress, and waits for room as long as it takes.

    Its log files stay complete.
    """
    import ray.data  # noqa: PLC0415

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # It ends an execution without progress for half an hour: whoever waits for room in a busy cluster.
    context.execution_no_progress_timeout_s = _NO_LIMIT
    for handler in logging.getLogger("ray.data").handlers:
        # The one of Ray's own: others may serve other loggers too.
        if handler.name == _CONSOLE:
            handler.setLevel(logging.ERROR)


def settle_ray_data() -> None:
    """Let Ray Data start here the actors that all jobs of the cluster share, before others start them.

    Whoever uses it first starts them, and within a reservation that captures what is started, as that of a trial is,
    they die with it: under the hands of all the others.
    """
    import ray.data  # noqa: PLC0415

    set_up_ray_data()
    pool = ray.data.ActorPoolStrategy(size=1)
    # Not `range`: its task wants a whole CPU, and others may hold them all.
    ray.data.from_items([{"item": 0}]).map_batches(_Settler, compute=pool, num_cpus=0).materialize()


class _Settler:
    """An operator that does nothing."""

    def __call__(self, batch: Any) -> Any:
        return batch


def first_cause(error: BaseException) -> ConvoyError:
    """Our own error from inside Ray's wrapping, or a ClusterError with Ray's words: a ClusterLost if Ray is gone."""
    from ray.exceptions import LocalRayletDiedError, NodeDiedError, RpcError  # noqa: PLC0415

    kind, pending, seen = ClusterError, [error], set[int]()
    while pending:
        cause = pending.pop(0)
        if isinstance(cause, ConvoyError):
            # An error of ours that comes out of an actor is also one of Ray's, with a trace for its words.
            ours: ConvoyError = getattr(cause, "cause", cause)
            return ours
        if isinstance(cause, (LocalRayletDiedError, NodeDiedError, RpcError)):
            kind = ClusterLost
        seen.add(id(cause))
        # Ray Train keeps the errors of its workers by rank, and that of its controller.
        failures = [
            getattr(cause, "controller_failure", None),
            *getattr(cause, "worker_failures", {}).values(),
        ]
        inner = [getattr(cause, "cause", None), cause.__cause__, *failures]
        pending += [one for one in inner if isinstance(one, BaseException) and id(one) not in seen]
    # Some of Ray's errors have no words, only a name.
    words = str(error) + ("" if str(cause) else type(cause).__name__)
    return kind(
        f"a worker failed: {words}",
        next_step="run the same command again to go on; Ray's logs are in /tmp/ray/session_latest/logs",
    )
