"""The one call that goes up: how far a job is."""

from __future__ import annotations

from typing import Protocol

from convoy.core.training_events import TrainingEvent


class Progress(Protocol):
    """Told by a pipeline how far it is. Implementations draw a bar, write lines, or nothing."""

    def stage(self, text: str) -> None:
        """The job enters a stage that has no known length."""
        ...

    def start(self, total_samples: int, done_samples: int) -> None:
        """Work on samples begins; `done_samples` were finished by an earlier attempt."""
        ...

    def advance(self, results: int, rejects: int) -> None:
        """Samples were finished."""
        ...

    def training(self, event: TrainingEvent) -> None:
        """A training went on; the results of its epochs come with it."""
        ...


class Silent:
    """Progress that nobody watches."""

    def stage(self, text: str) -> None:
        """Say nothing."""

    def start(self, total_samples: int, done_samples: int) -> None:
        """Say nothing."""

    def advance(self, results: int, rejects: int) -> None:
        """Say nothing."""

    def training(self, event: TrainingEvent) -> None:
        """Say nothing."""
