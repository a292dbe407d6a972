"""Characters that nobody sees: shown by their codes, so that a name can neither hide nor command anything."""

from __future__ import annotations

import unicodedata

# Control (which terminals obey), format (which turn directions), surrogate and private characters.
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co"})
# Joiners, without which some scripts cannot be written.
_HARMLESS = frozenset("\n\t\u200c\u200d")


def with_codes(text: str) -> str:
    """The text with the code of each character in its place that is invisible, turns directions or steers terminals."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_shown(character) for character in text)


def _shown(character: str) -> str:
    if character in _HARMLESS or unicodedata.category(character) not in _HIDDEN:
        return character
    return f"\\u{ord(character):04x}"
