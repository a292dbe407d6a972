"""Arrays that may be larger than memory: those lie in a file without a name, which is gone with them."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from convoy.core.errors import StorageFull
from convoy.core.machine import free_memory_bytes

# An array that would take a larger share of what is free lies on disk: others come beside it.
_LARGEST_SHARE_OF_MEMORY = 0.25


def large_array(shape: Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
    """An array to be filled: in memory, or in a temporary file where it would take over a quarter of what is free.

    Raises StorageFull where the temporary folder has no room for it either.
    """
    num_bytes, free_bytes = math.prod(shape) * np.dtype(dtype).itemsize, free_memory_bytes()
    if free_bytes is None or num_bytes <= free_bytes * _LARGEST_SHARE_OF_MEMORY:
        return np.empty(shape, dtype)
    with tempfile.TemporaryFile(prefix="convoy-") as file:
        try:
            # All of it now: a full disk would end the process at the write of a page.
            os.posix_fallocate(file.fileno(), 0, num_bytes)
        except OSError as error:
            raise StorageFull(
                f"{num_bytes / 1e9:,.1f} GB have no room on disk, nor in memory, where {free_bytes / 1e9:,.1f} GB are"
                f" free: {error.strerror}",
                where=tempfile.gettempdir(),
                next_step="make room there, or let TMPDIR name a larger disk; the same command then goes on",
            ) from None
        return np.asarray(np.memmap(file, dtype, "r+", shape=tuple(shape)))


def large_take(array: NDArray[Any], *places: Sequence[int]) -> NDArray[Any]:
    """`array[np.ix_(*places)]`, copied piece by piece to where `large_array` says. What is all of it is not copied."""
    if all(list(taken) == list(range(size)) for taken, size in zip(places, array.shape, strict=False)):
        return array
    sizes = tuple(len(taken) for taken in places)
    result = large_array((*sizes, *array.shape[len(sizes) :]), array.dtype)
    for index in np.ndindex(*sizes):
        result[index] = array[tuple(taken[at] for taken, at in zip(places, index, strict=True))]
    return result
