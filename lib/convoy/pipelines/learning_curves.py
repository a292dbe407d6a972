"""The epochs of a training in its run folder, as numbers and as a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

from convoy.core.errors import StorageError
from convoy.core.fingerprints import canonical_json
from convoy.core.training_events import EpochResult, TrainingEvent
from convoy.storage.runs import RunFolder

CURVES_FILE = "learning_curves.png"


class LearningCurves:
    """What a training's driver hears of its epochs, written as each phase ends and whenever it is asked to."""

    def __init__(self, folder: RunFolder, draw: Callable[[Sequence[EpochResult]], bytes]) -> None:
        self._folder, self._draw = folder, draw
        # By epoch: a restarted group tells some again.
        self._heard: dict[int, EpochResult] = {}
        self._phase: str | None = None

    def hear(self, event: TrainingEvent) -> None:
        """Remember the epochs of an event; if it begins another phase, write those before."""
        if self._phase not in (None, event.phase):
            self.write_heard()
        self._phase = event.phase
        self._heard |= {one.epoch: one for one in (*event.history, event.result) if one is not None}

    def write_heard(self) -> None:
        """Write the epochs that were heard of, if the store takes them: what trains, or why it failed, counts more."""
        with suppress(StorageError):
            self.write(list(self._heard.values()))

    def write(self, history: Sequence[EpochResult]) -> None:
        """Write these epochs; nothing if there is none."""
        if history:
            document = canonical_json([one.model_dump(mode="json") for one in history])
            self._folder.store.put(self._folder.key("history.json"), document)
            self._folder.store.put(self._folder.key(CURVES_FILE), self._draw(history))
