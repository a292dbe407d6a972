"""Randomness as a pure function of where it is used, so that workers, batches and kills cannot change it."""

from __future__ import annotations

import numpy as np

from convoy.core.fingerprints import digest_bytes


def position_digest(seed: int, *position: str | int | bytes) -> bytes:
    """16 bytes that depend only on the seed and the position, for example (epoch, content_id, view)."""
    parts = (part if isinstance(part, bytes) else str(part).encode() for part in (seed, *position))
    return digest_bytes(b"\x1f".join(parts))


def generator(seed: int, *position: str | int | bytes) -> np.random.Generator:
    """A random generator for one position."""
    return np.random.Generator(np.random.PCG64(int.from_bytes(position_digest(seed, *position), "big")))


def unit_interval(seed: int, *position: str | int | bytes) -> float:
    """One number in [0, 1) for the position, cheaper than a generator."""
    return int.from_bytes(position_digest(seed, *position)[:6], "big") / (1 << 48)
