"""Gives back what a group of workers has reserved when the controller that reserved it was killed."""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.util.placement_group import PlacementGroup, remove_placement_group

_POLL_S = 1.0


class ReservationKeeper:
    """An actor that outlives the controller: Ray frees a placement group of a dead actor only when the job ends."""

    def __init__(self, controller: Any) -> None:
        self._controller = controller
        self._reservation: PlacementGroup | None = None

    def keep(self, reservation: PlacementGroup) -> None:
        """What to give back: that of the newest group, for a controller frees the one before it starts another."""
        self._reservation = reservation

    def watch(self) -> None:
        """Wait until the controller dies, give back what it has reserved, and end."""
        while self._lives():
            time.sleep(_POLL_S)
        if self._reservation is not None:
            remove_placement_group(self._reservation)
        ray.actor.exit_actor()

    def _lives(self) -> bool:
        try:
            ray.get(self._controller.__ray_ready__.remote())
        except ActorDiedError:
            return False
        except ActorUnavailableError:
            # Nobody knows yet.
            return True
        return True
