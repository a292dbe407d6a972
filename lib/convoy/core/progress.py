"""The one call that goes up: how far a job is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from convoy.core.training_events import TrainingEvent
from convoy.core.trial_events import TrialStatus


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

    def trials(self, statuses: Sequence[TrialStatus]) -> None:
        """A trial of a search began, went on or ended: all of them as they stand, in the order of their start."""
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

    def trials(self, statuses: Sequence[TrialStatus]) -> None:
        """Say nothing."""
