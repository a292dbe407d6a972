"""The points of a head's path in a run folder, so that a driver that is killed while it fits does not begin anew."""

from __future__ import annotations

import io
import zipfile
from typing import Any

import numpy as np

from convoy.core.crash_points import CrashPoint, crash_point
from convoy.core.errors import ObjectNotFound
from convoy.core.fingerprints import digest
from convoy.storage.checkpoints import HEAD_POINTS
from convoy.storage.runs import RunFolder
from convoy.vision.head_path import PathPoint


class RunHeadPoints:
    """One file for each C. The folder may be that of a try of another `identity`, whose points are not found."""

    def __init__(self, folder: RunFolder, identity: dict[str, Any]) -> None:
        self._folder, self._identity = folder, digest(identity)

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
        except (ObjectNotFound, zipfile.BadZipFile, KeyError, ValueError, EOFError):
            return None

    def put(self, fit: str, c: float, point: PathPoint) -> None:
        """Keep a point: 8 bytes a parameter."""
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

    def _key(self, fit: str, c: float) -> str:
        return self._folder.key(f"{HEAD_POINTS}/{self._identity}/{fit}/{c!r}.npz")
