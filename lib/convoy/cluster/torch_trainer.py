"""Ray's TorchTrainer without the wait at the end of a training on a Ray that has no dashboard."""

from __future__ import annotations

import socket
from typing import Any

from ray.experimental.internal_kv import _internal_kv_get
from ray.train.torch import TorchTrainer

_CONNECT_TIMEOUT_S = 1.0
_CLEANER = "PlacementGroupCleanerCallback"


class PromptTrainer(TorchTrainer):  # type: ignore[misc] # Ray has no types
    """A TorchTrainer whose placement groups are looked after only where that can work.

    Ray Train's cleaner asks the dashboard whether the controller lives. Without one it waits for an answer, or for
    a cluster that a forgotten file in /tmp/ray names, and the training waits 12 s for the cleaner to stop.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks: list[Any] = super()._create_default_callbacks()
        if _has_dashboard():
            return callbacks
        return [one for one in callbacks if type(one).__name__ != _CLEANER]


def _has_dashboard() -> bool:
    """Whether the dashboard's address, which is noted even where it serves nobody, takes connections."""
    address = _internal_kv_get(b"dashboard", namespace=b"dashboard")
    if not address:
        return False
    host, _, port = address.decode().rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError:
        return False
    return True
