"""How long a search has searched, over all of its calls: what its budget of hours and dollars counts."""

from __future__ import annotations

import time

from convoy.core.config import StrictModel
from convoy.core.fingerprints import canonical_json
from convoy.storage.documents import read_model
from convoy.storage.runs import RunFolder

_CALLS = "calls/"
# What a kill may take from the count.
_KEEP_EVERY_S = 15.0


class SearchedTime(StrictModel):
    """`calls/<token>.json`: for how many seconds a call has searched; the token is that of its lease."""

    seconds: float


class SearchTimer:
    """Measures the search of one call from now on, and keeps the time in the run folder as it goes by."""

    def __init__(self, folder: RunFolder, token: int) -> None:
        self._store, self._key = folder.store, folder.key(f"{_CALLS}{token}.json")
        self._started_s = self._kept_s = time.monotonic()

    def tick(self) -> None:
        """Keep the time if it was not kept for a while."""
        if time.monotonic() - self._kept_s >= _KEEP_EVERY_S:
            self.keep()

    def keep(self) -> None:
        """Keep the time up to now."""
        self._kept_s = time.monotonic()
        searched = SearchedTime(seconds=self._kept_s - self._started_s)
        self._store.put(self._key, canonical_json(searched))


def seconds_spent(folder: RunFolder) -> float:
    """For how many seconds all calls of a search have searched, those that were killed included."""
    keys = [info.key for info in folder.store.list_objects(folder.key(_CALLS))]
    calls = (read_model(SearchedTime, folder.store, key) for key in keys)
    return sum(call.seconds for call in calls if call is not None)
