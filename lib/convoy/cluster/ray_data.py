"""What every job on Ray Data does alike: leave the terminal alone, and say what went wrong in our own words."""

from __future__ import annotations

import logging

from convoy.core.errors import ClusterError, ConvoyError


def quiet_ray_data() -> None:
    """Leave the terminal to our own progress; Ray's log files stay complete."""
    import ray.data  # noqa: PLC0415

    ray.data.DataContext.get_current().enable_progress_bars = False
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.ERROR)


def first_cause(error: BaseException) -> ConvoyError:
    """Our own error from inside Ray's wrapping, or a ClusterError with Ray's words."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ConvoyError):
            return cause
        cause = getattr(cause, "cause", None) or cause.__cause__
    return ClusterError(
        f"a worker failed: {error}",
        next_step="run the same command again to go on; Ray's logs are in /tmp/ray/session_latest/logs",
    )
