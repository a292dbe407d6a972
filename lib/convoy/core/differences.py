"""In what two documents differ, value by value."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from convoy.core.config import StrictModel


class Difference(StrictModel):
    """A value that two documents do not share, by the keys that lead to it; null where one has none."""

    key: str
    first: Any
    second: Any


def differences(first: Any, second: Any) -> list[Difference]:
    """Whatever differs between two JSON-like values, in the order of their sorted keys."""
    return list(_differences(first, second, ""))


def describe_changes(before: Any, now: Any) -> list[str]:
    """A line for each value that differs, for the error that refuses to go on."""
    return [f"  {one.key}: was {one.first!r}, is {one.second!r}" for one in differences(before, now)]


def _differences(first: Any, second: Any, key: str) -> Iterator[Difference]:
    if isinstance(first, dict) and isinstance(second, dict):
        for name in sorted(first.keys() | second.keys()):
            yield from _differences(first.get(name), second.get(name), f"{key}.{name}" if key else name)
    elif first != second:
        yield Difference(key=key, first=first, second=second)
