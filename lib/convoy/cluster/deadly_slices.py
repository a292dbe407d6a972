"""Slices and batches that end every worker that has them: Ray alone would go on with such a one for ever."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

from convoy.core.errors import ClusterError

# Deaths of workers that had the slice, behind the first one, which is not known to be its doing.
_MOST_DEATHS = 5
_NAMESPACE = "convoy"


class DeathWatch:
    """Counts how often a slice was begun, and not ended, in workers that took the place of dead ones.

    The counts lie in Ray's own key-value store, under the `token` of the pool: they outlive the workers. Where
    nobody dies nothing is counted. `kind` is what the pool calls its slices, `next_step` what to do about a deadly one.
    """

    def __init__(self, token: str, *, kind: str, next_step: str) -> None:
        self._token, self._kind, self._next_step = token, kind, next_step

    @contextmanager
    def watching(self, name: str) -> Iterator[None]:
        """Note that the slice of that name is being worked on. ClusterError if it has ended too many workers."""
        if not self._follows_a_death:
            yield
            return
        from ray.experimental import internal_kv  # noqa: PLC0415

        key = f"{self._token}/{name}"
        num_deaths = int(internal_kv._internal_kv_get(key, namespace=_NAMESPACE) or 0)
        if num_deaths >= _MOST_DEATHS:
            raise ClusterError(
                f"one {self._kind} ended {num_deaths} workers, one after another",
                where=f"{self._kind} {name}",
                next_step=self._next_step,
            )
        internal_kv._internal_kv_put(key, str(num_deaths + 1), overwrite=True, namespace=_NAMESPACE)
        try:
            yield
        finally:
            internal_kv._internal_kv_del(key, namespace=_NAMESPACE)

    @cached_property
    def _follows_a_death(self) -> bool:
        import ray  # noqa: PLC0415

        return bool(ray.get_runtime_context().was_current_actor_reconstructed)
