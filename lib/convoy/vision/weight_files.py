"""Weight files as bytes, where torch is not worth its import."""

from __future__ import annotations

from typing import Any

import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from convoy.core.errors import DataError

_NEXT_STEP = "bring the file as a training wrote it, or train again"


def float32_below(data: bytes, prefix: str, *, where: str) -> bytes:
    """Of a safetensors file, one of only those tensors whose names begin with a prefix, all of them float32.

    Raises DataError for other bytes and other types.
    """
    try:
        tensors: list[tuple[str, dict[str, Any]]] = deserialize(data)  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise DataError(f"this is no safetensors file: {error}", where=where, next_step=_NEXT_STEP) from None
    found = {name: tensor for name, tensor in tensors if name.startswith(prefix)}
    if others := {tensor["dtype"] for tensor in found.values()} - {"F32"}:
        raise DataError(
            f"the tensors of {prefix} have the types {', '.join(sorted(others))}, not float32",
            where=where,
            next_step=_NEXT_STEP,
        )
    arrays = {
        name: np.frombuffer(tensor["data"], np.float32).reshape(tensor["shape"])
        for name, tensor in found.items()
    }
    return bytes(save(arrays))
