"""Slices and batches that end every worker that has them: Ray alone would go on with such a one for ever.

A single image may be what does it: a read that hangs, a decoder that crashes or takes all memory. It is found, and left
out. Anything else ends the run.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Protocol

from convoy.core.errors import ClusterError
from convoy.core.records import RejectCode, SampleRejected, Stage

# Deaths of workers that had the slice, behind the first one, which is not known to be its doing.
_MOST_DEATHS = 5
# One may be chance: a worker is killed for other reasons too, and has some image in hand then.
_DEATHS_OF_AN_IMAGE = 2
# If there are more in one slice, it is not the images.
_MOST_DEADLY_IMAGES = 3
# Deaths of one worker before it was ready, behind the first one.
_MOST_DEATHS_AT_START = 3
_NAMESPACE = "convoy"


class Notes(Protocol):
    """What outlives the workers of a pool: short texts by name."""

    def get(self, name: str) -> str | None:
        """The text, or None where there is none."""
        ...

    def put(self, name: str, text: str) -> None:
        """Keep the text in place of an earlier one."""
        ...

    def delete(self, name: str) -> None:
        """Forget the text, if there is one."""
        ...


class ImageTrials:
    """Images of a slice that has ended workers, one at a time: if this worker ends too, the next one knows with which.

    `name` is what the notes are kept under.
    """

    def __init__(self, notes: Notes, name: str) -> None:
        self._notes, self._name = notes, name
        kept = json.loads(notes.get(name) or "{}")
        self._deaths = Counter[str](kept.get("deaths"))
        if kept.get("begun") is not None:
            self._deaths[kept["begun"]] += 1

    @property
    def deadly(self) -> list[str]:
        """The ids of samples that have ended workers, several each, while nothing else was read or decoded."""
        return [sample_id for sample_id, deaths in self._deaths.items() if deaths >= _DEATHS_OF_AN_IMAGE]

    def begin(self, sample_id: str) -> None:
        """From now on nothing but this sample is read and decoded."""
        self._put(sample_id)

    def end(self) -> None:
        """The samples have been tried. What ends the worker now is none of them alone."""
        self._put(None)

    def _put(self, begun: str | None) -> None:
        self._notes.put(self._name, json.dumps({"deaths": self._deaths, "begun": begun}))


def deadly_image() -> SampleRejected:
    """The reject of a sample that has ended workers."""
    reason = f"{_DEATHS_OF_AN_IMAGE} workers ended in turn while they read or decoded this image and no other"
    return SampleRejected(RejectCode.ENDS_WORKERS, Stage.FETCH, reason)


class DeathWatch:
    """Counts how often a slice was begun, and not ended, in workers that took the place of dead ones.

    The counts lie in Ray's own key-value store, under the `token` of the pool: they outlive the workers. Where
    nobody dies nothing is counted. `kind` is what the pool calls its slices, `next_step` what to do about a deadly one.
    """

    def __init__(self, token: str, *, kind: str, next_step: str) -> None:
        self._notes, self._kind, self._next_step = _RayNotes(token), kind, next_step

    @contextmanager
    def watching(self, name: str) -> Iterator[ImageTrials | None]:
        """Note that the slice of that name is being worked on. ClusterError if it has ended too many workers.

        Where it has ended one that followed a death, its images should be tried one at a time: the trials are given.
        """
        if not self._follows_a_death:
            yield None
            return
        of_images = f"{name}/images"
        num_deaths = int(self._notes.get(name) or 0)
        trials = ImageTrials(self._notes, of_images) if num_deaths else None
        num_deadly = len(trials.deadly) if trials else 0
        if num_deaths >= _MOST_DEATHS + _DEATHS_OF_AN_IMAGE * min(num_deadly, _MOST_DEADLY_IMAGES):
            raise ClusterError(
                f"one {self._kind} ended {num_deaths} workers, one after another",
                where=f"{self._kind} {name}",
                next_step=self._next_step,
            )
        self._notes.put(name, str(num_deaths + 1))
        try:
            yield trials
        finally:
            self._notes.delete(name)
            self._notes.delete(of_images)

    @contextmanager
    def starting(self, next_step: str) -> Iterator[None]:
        """Note that this worker is being made. ClusterError if too many died in its place before they were ready."""
        if not self._follows_a_death:
            yield
            return
        name = f"start of {self._place}"
        num_deaths = int(self._notes.get(name) or 0)
        if num_deaths >= _MOST_DEATHS_AT_START:
            raise ClusterError(
                f"a worker ended {num_deaths} times, one after another, before it was ready",
                next_step=next_step,
            )
        self._notes.put(name, str(num_deaths + 1))
        try:
            yield
        finally:
            self._notes.delete(name)

    @cached_property
    def _place(self) -> str:
        """The worker's place in its pool, which one that follows it takes over."""
        import ray  # noqa: PLC0415

        return str(ray.get_runtime_context().get_actor_id())

    @cached_property
    def _follows_a_death(self) -> bool:
        import ray  # noqa: PLC0415

        return bool(ray.get_runtime_context().was_current_actor_reconstructed)


class _RayNotes:
    """Notes in Ray's own key-value store, where those of other tokens do not meet them."""

    def __init__(self, token: str) -> None:
        self._token = token

    def get(self, name: str) -> str | None:
        from ray.experimental import internal_kv  # noqa: PLC0415

        text: bytes | None = internal_kv._internal_kv_get(self._key(name), namespace=_NAMESPACE)
        return None if text is None else text.decode()

    def put(self, name: str, text: str) -> None:
        from ray.experimental import internal_kv  # noqa: PLC0415

        internal_kv._internal_kv_put(self._key(name), text, overwrite=True, namespace=_NAMESPACE)

    def delete(self, name: str) -> None:
        from ray.experimental import internal_kv  # noqa: PLC0415

        internal_kv._internal_kv_del(self._key(name), namespace=_NAMESPACE)

    def _key(self, name: str) -> str:
        return f"{self._token}/{name}"
