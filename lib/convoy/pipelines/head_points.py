"""The points of a head's path in a run folder, so that a driver that is killed while it fits does not begin anew."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np

from convoy.core.code_revision import current_versions
from convoy.core.crash_points import CrashPoint, crash_point
from convoy.core.errors import ChecksumMismatch, ObjectNotFound
from convoy.core.fingerprints import digest
from convoy.storage.checkpoints import HEAD_POINTS
from convoy.storage.runs import RunFolder
from convoy.vision.head_path import PathPoint


class RunHeadPoints:
    """One file for each C. `check` is called before each, and raises where the run is not this driver's any more.

    The folder may be that of a try of another `identity`, or by other code: points of those are not found.
    """

    def __init__(self, folder: RunFolder, identity: dict[str, Any], check: Callable[[], None]) -> None:
        self._folder, self._check = folder, check
        # Until a run has a record, nothing else says by which code it began.
        self._identity = digest([identity, current_versions()])

    def get(self, fit: str, c: float) -> PathPoint | None:
        """The point that was kept; None where there is none, or its file is damaged."""
        try:
            data = self._folder.store.get(self._key(fit, c)).data
            # A member's checksum is verified as it is read.
            with np.load(io.BytesIO(data), allow_pickle=False) as file:
                return PathPoint(
                    parameters_P=file["parameters_P"],
                    num_iterations=int(file["num_iterations"]),
                    converged=bool(file["converged"]),
                    seconds=float(file["seconds"]),
                )
        except (ObjectNotFound, ChecksumMismatch, zipfile.BadZipFile, KeyError, ValueError, EOFError):
            return None

    def put(self, fit: str, c: float, point: PathPoint) -> None:
        """Keep a point: 8 bytes a parameter."""
        self._check()
        buffer = io.BytesIO()
        np.savez(
            buffer,
            parameters_P=point.parameters_P,
            num_iterations=point.num_iterations,
            converged=point.converged,
            seconds=point.seconds,
        )
        self._folder.store.put(self._key(fit, c), buffer.getvalue())
        crash_point(CrashPoint.HEAD_POINT_KEPT)

    def remove(self) -> None:
        """Delete all points of the folder."""
        store = self._folder.store
        store.delete(info.key for info in store.list_objects(self._folder.key(f"{HEAD_POINTS}/")))

    def _key(self, fit: str, c: float) -> str:
        return self._folder.key(f"{HEAD_POINTS}/{self._identity}/{fit}/{c!r}.npz")
