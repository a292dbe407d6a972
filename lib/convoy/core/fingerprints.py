"""Digests of values, bytes and sets of rows. All are BLAKE2b with 128 bits, written as 32 hex digits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

from numpy.typing import NDArray
from pydantic import BaseModel

DIGEST_BYTES = 16
_MODULUS = 1 << (8 * DIGEST_BYTES)


def digest_bytes(data: bytes | memoryview) -> bytes:
    """The raw 16-byte digest of some bytes."""
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


def canonical_json(value: Any) -> bytes:
    """One byte string for equal values: sorted keys, no spaces, pydantic models as their fields."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=_plain, allow_nan=False
    ).encode()


def digest(value: Any) -> str:
    """The digest of a JSON-like value, as 32 hex digits."""
    return digest_bytes(canonical_json(value)).hex()


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, bytes):
        return value.hex()
    raise TypeError(f"{type(value).__name__} has no canonical form")


class MultisetDigest:
    """A digest of rows that does not depend on their order, and that can be added up over parts.

    The sum modulo 2^128 of the rows' digests: unlike an XOR, a doubled row changes it.
    """

    def __init__(self, hex_digest: str = "0" * 2 * DIGEST_BYTES) -> None:
        self._sum = int(hex_digest, 16)

    def add_row(self, *fields: bytes) -> None:
        """Add one row, given as byte fields."""
        row = hashlib.blake2b(digest_size=DIGEST_BYTES)
        for field in fields:
            row.update(len(field).to_bytes(8, "little"))
            row.update(field)
        self._sum = (self._sum + int.from_bytes(row.digest(), "big")) % _MODULUS

    def hexdigest(self) -> str:
        """The digest so far, as 32 hex digits."""
        return f"{self._sum:0{2 * DIGEST_BYTES}x}"

    @classmethod
    def total(cls, hex_digests: Iterable[str]) -> str:
        """The digest of the union of parts, from the parts' digests."""
        return f"{sum(int(part, 16) for part in hex_digests) % _MODULUS:0{2 * DIGEST_BYTES}x}"


def rows_digest(sample_ids: Sequence[str], values_N: NDArray[Any]) -> str:
    """The multiset digest of N rows, each a sample id and the bytes of its values, an array of any shape."""
    digest = MultisetDigest()
    for sample_id, values in zip(sample_ids, values_N, strict=True):
        digest.add_row(sample_id.encode(), values.tobytes())
    return digest.hexdigest()
