"""Notes of a pool outside Ray: they outlive its workers by being handed on."""

from __future__ import annotations


class KeptNotes(dict[str, str]):
    """See Notes."""

    def put(self, name: str, text: str) -> None:
        """Keep the text."""
        self[name] = text

    def delete(self, name: str) -> None:
        """Forget it."""
        self.pop(name, None)
