"""When it is worth a line that a job finishes nothing: in the log of a run that hangs people see no difference."""

from __future__ import annotations

_FIRST_S = 120.0
# Slices of one run take about as long as each other.
_TIMES_THE_LONGEST_WAIT = 3


class Stillness:
    """What is to be said of the time since a job last finished something.

    Nothing for two minutes, nor for three times the longest wait so far; then once, and again each time that it has
    doubled. Seconds are those of one clock, whichever.
    """

    def __init__(self, now_s: float) -> None:
        self._last_s, self._longest_s = now_s, 0.0
        self._due_s = _FIRST_S

    def finished(self, now_s: float) -> None:
        """The job has finished something."""
        self._longest_s = max(self._longest_s, now_s - self._last_s)
        self._last_s = now_s
        self._due_s = max(_FIRST_S, _TIMES_THE_LONGEST_WAIT * self._longest_s)

    def news(self, now_s: float) -> str | None:
        """The line that is due now, if there is one."""
        still_s = now_s - self._last_s
        if still_s < self._due_s:
            return None
        self._due_s = 2 * still_s
        before = f"; before, {self._longest_s:,.0f} s were the most" if self._longest_s else ""
        return f"no slice has been finished for {still_s:,.0f} s{before}"
