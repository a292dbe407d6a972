"""A stall watch that ends no process."""

from __future__ import annotations

from convoy.cluster.stall_watch import StallWatch


class NotingWatch(StallWatch):
    """Notes in `events` what it is told: `begin`, `moved`, `rest`."""

    def __init__(self, limit_s: float = 1.0) -> None:
        super().__init__(limit_s)
        self.events: list[str] = []

    def begin(self) -> None:
        """Something has to move."""
        self.events.append("begin")

    def moved(self) -> None:
        """Something has moved."""
        self.events.append("moved")

    def rest(self) -> None:
        """Nothing has to move."""
        self.events.append("rest")
