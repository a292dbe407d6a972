"""Looking through the runs of a workspace, the newest first, with the next ones read ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from convoy.core.errors import OF_ONE_FILE
from convoy.storage.object_store import ObjectStore
from convoy.storage.runs import RunFolder, run_ids

_THREADS = 16
_AHEAD = 64

FoundT = TypeVar("FoundT")


def newest_first(
    store: ObjectStore, read: Callable[[RunFolder], FoundT], *, most: int
) -> Iterator[tuple[RunFolder, FoundT]]:
    """What `read` says of each of the newest runs, `most` at most; some are read that nobody asks for any more.

    Of a run with damaged files nothing is said.
    """

    def read_sound(folder: RunFolder) -> tuple[FoundT] | None:
        try:
            return (read(folder),)
        except OF_ONE_FILE:
            return None

    folders = [RunFolder(store, run_id) for run_id in reversed(run_ids(store)[-most:])]
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(folders), _AHEAD):
            some = folders[start : start + _AHEAD]
            for folder, found in zip(some, pool.map(read_sound, some), strict=True):
                if found is not None:
                    yield folder, *found
