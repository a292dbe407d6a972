"""A small actor between the training workers and the driver: the first worker posts, the driver takes.

It outlives a group of workers, and so can tell the next one why there is no point in trying again.
"""

from __future__ import annotations

import time
from typing import Any

from convoy.core.errors import ConvoyError
from convoy.core.training_events import TrainingEvent

_SECONDS_BETWEEN_EVENTS = 1.0


class Board:
    """The actor's class: holds events until the driver takes them."""

    def __init__(self) -> None:
        self._events: list[str] = []
        self._failure: ConvoyError | None = None

    def give_up(self, failure: ConvoyError) -> None:
        """Keep an error that another attempt would only meet again."""
        self._failure = failure

    def failure(self) -> ConvoyError | None:
        """That error, if there is one."""
        return self._failure

    def post(self, event: str) -> None:
        """Keep an event."""
        self._events.append(event)

    def take(self) -> list[str]:
        """All events since the last call, in order."""
        events, self._events = self._events, []
        return events


class BoardWriter:
    """The workers' end: glimpses at most once a second, and every result. Only the first worker has a board."""

    def __init__(self, board: Any | None) -> None:
        self._board = board
        self._last_s = 0.0

    def is_due(self) -> bool:
        """Whether a second has gone by since the last event."""
        return self._board is not None and time.monotonic() - self._last_s >= _SECONDS_BETWEEN_EVENTS

    def post(self, event: TrainingEvent) -> None:
        """Send an event, without waiting for it to arrive."""
        if self._board is not None:
            self._last_s = time.monotonic()
            self._board.post.remote(event.model_dump_json())


class BoardReader:
    """The driver's end."""

    def __init__(self, board: Any) -> None:
        self._board = board

    def take(self) -> list[TrainingEvent]:
        """All events since the last call, in order."""
        import ray  # noqa: PLC0415

        return [TrainingEvent.model_validate_json(event) for event in ray.get(self._board.take.remote())]
