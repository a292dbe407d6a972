"""What stopped or failed trials and killed retrainings leave: trainings that no command goes on with."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from convoy.pipelines.network_training import open_training
from convoy.storage.leases import give_up, living_holders
from convoy.storage.object_store import ObjectStore
from convoy.storage.runs import OpenRun

_THREADS = 8


def give_up_trainings(store: ObjectStore, targets: Iterable[str]) -> None:
    """Give up the unfinished trainings of these targets, but for those that a driver is at work on.

    Leases that are held are watched for their time to live: a process that was stopped could not free its own.
    """
    pointers = [open_training(store, target) for target in targets]
    with ThreadPoolExecutor(_THREADS) as pool:
        folders = list(pool.map(OpenRun.unfinished, pointers))
    unfinished = [
        (pointer, folder) for pointer, folder in zip(pointers, folders, strict=True) if folder is not None
    ]
    living = living_holders([folder for _, folder in unfinished])
    for pointer, folder in unfinished:
        if folder.run_id not in living:
            # In this order, as where a run is cancelled.
            pointer.close(folder)
            give_up(folder)
