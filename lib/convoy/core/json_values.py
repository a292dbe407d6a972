"""Values that JSON has words for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any


def finite_or_null(value: Any) -> Any:
    """The same value with None for each number that is not finite, which JSON has no word for."""
    if isinstance(value, Mapping):
        return {str(key): finite_or_null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The values in a value that are no mappings or sequences, each after the dotted keys that lead to it."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from leaves(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from leaves(item, f"{key}.{index}" if key else str(index))
    else:
        yield key, value


def not_finite(value: Any) -> Iterator[tuple[str, float]]:
    """The numbers in a value that are not finite, each after the dotted keys that lead to it."""
    for key, leaf in leaves(value):
        if isinstance(leaf, float) and not math.isfinite(leaf):
            yield key, leaf
