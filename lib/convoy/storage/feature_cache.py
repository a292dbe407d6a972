"""The feature cache: activations keyed by everything that determines them, so that only new work is done.

A *feature set* holds one tap of one weight set for one view; its id is the digest of its spec. Its rows are
keyed by the content id of the manifest. Views and taps are separate sets: asking for one more of them, or for
more images, recomputes nothing that is there.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from convoy.core.config import StrictModel
from convoy.core.fingerprints import canonical_json, digest
from convoy.core.records import RejectCode, Stage
from convoy.storage.commits import PartFile, read_commits
from convoy.storage.documents import exists
from convoy.storage.object_store import ObjectStore

FEATURE_CACHE_VERSION = 1
_READ_THREADS = 8
_ID_DTYPE = np.dtype("S16")


class FeatureSetSpec(StrictModel):
    """Everything that determines the rows of a set, for any image.

    `code_digest` is that of a factory's network, `axis_version` by which rule the depths of one without a classifier
    are counted.
    """

    format_version: int = FEATURE_CACHE_VERSION
    decode_rule: dict[str, Any]
    view: int
    view_recipe: dict[str, Any]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    arch: str
    weights_digest: str
    # Left out where there is none, so that the sets of all other networks keep their ids.
    code_digest: str | None = Field(default=None, exclude_if=lambda value: value is None)
    axis_version: int | None = Field(default=None, exclude_if=lambda value: value is None)
    tap: str
    precision: str
    dtype: str

    @property
    def set_id(self) -> str:
        """The digest of the spec: 32 hex digits."""
        return digest(self)


@dataclass(frozen=True, slots=True)
class KnownContent:
    """The content ids that a set has rows for, and those whose bytes are known to be unusable; both sorted."""

    cached: np.ndarray
    rejected: np.ndarray

    def has_rows(self, content_ids: pa.Array) -> np.ndarray:
        """A boolean mask of the ids that are cached."""
        return contains(self.cached, content_id_array(content_ids))

    def missing(self, content_ids: pa.Array) -> np.ndarray:
        """A boolean mask of the ids that are neither cached nor known to be unusable."""
        usable = ~contains(self.rejected, content_id_array(content_ids))
        mask: np.ndarray = usable & ~self.has_rows(content_ids)
        return mask


@dataclass(frozen=True, slots=True)
class PartIndex:
    """Which part of a set each of its rows is in, for many looks: 20 bytes of memory a row."""

    parts: tuple[PartFile, ...]
    ids_N: np.ndarray
    part_N: np.ndarray

    def parts_with(self, sorted_ids: np.ndarray) -> list[PartFile]:
        """The parts that hold one of the ids, in their order in the set."""
        holding = np.unique(self.part_N[contains(sorted_ids, self.ids_N)])
        return [self.parts[number] for number in holding.tolist()]


class FeatureCache:
    """The sets below `features/` of a workspace."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def describe(self, spec: FeatureSetSpec) -> None:
        """Write the spec beside the set's rows, for people and for `gc`."""
        key = f"features/{spec.set_id}/spec.json"
        if not exists(self._store, key):
            self._store.put(key, canonical_json(spec))

    def known_content(self, set_id: str) -> KnownContent:
        """What needs no work in this set: 16 bytes of memory for each row."""
        commits = read_commits(self._store, set_id)
        parts = [part for commit in commits for part in commit.parts]
        rejects = [part for commit in commits for part in commit.rejects]
        # A fetch may succeed next time; what the set's decode rule and network cannot use stays so.
        return KnownContent(
            cached=self._collect_ids(parts, ["content_id"]),
            rejected=self._collect_ids(rejects, ["content_id", "stage"]),
        )

    def rejected_content(self, set_id: str) -> pa.Table:
        """All remembered rejects of a set: columns of the reject table."""
        tables = list(self._read_parts(self._reject_parts(set_id), None))
        return pa.concat_tables(tables) if tables else pa.table({})

    def count_rejects(self, set_ids: Iterable[str], content_ids: np.ndarray) -> dict[str, int]:
        """Why some contents have no rows in one of the sets: how many for each code of their remembered rejects.

        The last reject counts, and what none tells of is unreadable. Some 100 bytes of memory for each content id.
        """
        if not len(content_ids):
            return {}
        lost, counts = np.unique(content_ids, return_counts=True)
        codes = np.full(len(lost), RejectCode.UNREADABLE.value, object)
        for set_id in set_ids:
            for table in self._read_parts(self._reject_parts(set_id), ["content_id", "code"]):
                found = content_id_array(table["content_id"])
                is_lost = contains(lost, found)
                positions = np.searchsorted(lost, found[is_lost])
                codes[positions] = table["code"].filter(pa.array(is_lost)).to_pylist()
        totals = Counter[str]()
        for code, count in zip(codes, counts, strict=True):
            totals[code] += int(count)
        return dict(totals)

    def part_index(self, set_id: str) -> PartIndex:
        """The committed parts of a set by the content ids in them."""
        parts = self._parts(set_id)
        ids = [content_id_array(table["content_id"]) for table in self._read_parts(parts, ["content_id"])]
        ids_N = np.concatenate(ids) if ids else np.empty(0, _ID_DTYPE)
        part_N = np.repeat(np.arange(len(ids), dtype=np.int32), [len(one) for one in ids])
        return PartIndex(tuple(parts), ids_N, part_N)

    def iter_parts(
        self,
        set_id: str,
        columns: Sequence[str],
        *,
        having: np.ndarray | None = None,
        index: PartIndex | None = None,
    ) -> Iterator[pa.Table]:
        """The committed parts of a set, one table each, in a fixed order, read ahead by threads.

        With `having`, sorted content ids, only parts that hold one of them; of the others nothing but ids is read, and
        with the set's `index` not even those.
        """
        if having is not None and index is not None:
            return self._read_parts(index.parts_with(having), columns)
        return self._read_parts(self._parts(set_id), columns, having)

    def _parts(self, set_id: str) -> list[PartFile]:
        return [part for commit in read_commits(self._store, set_id) for part in commit.parts]

    def _reject_parts(self, set_id: str) -> list[PartFile]:
        return [part for commit in read_commits(self._store, set_id) for part in commit.rejects]

    def _read_parts(
        self, parts: Sequence[PartFile], columns: Sequence[str] | None, having: np.ndarray | None = None
    ) -> Iterator[pa.Table]:
        with ThreadPoolExecutor(_READ_THREADS) as pool:
            pending: deque[Future[pa.Table | None]] = deque()
            for part in parts:
                pending.append(pool.submit(self._read_part, part.key, columns, having))
                if len(pending) > _READ_THREADS and (table := pending.popleft().result()) is not None:
                    yield table
            for future in pending:
                if (table := future.result()) is not None:
                    yield table

    def _read_part(
        self, key: str, columns: Sequence[str] | None, having: np.ndarray | None
    ) -> pa.Table | None:
        parquet = self._store.open_parquet(key)
        if having is not None:
            ids = content_id_array(parquet.read(columns=["content_id"])["content_id"])
            if np.array_equal(np.searchsorted(having, ids, "left"), np.searchsorted(having, ids, "right")):
                return None
        return parquet.read(columns=columns)

    def _collect_ids(self, parts: Sequence[PartFile], columns: Sequence[str]) -> np.ndarray:
        """The sorted ids of some parts, in 16 bytes a row: filled part by part, sorted in place."""
        ids = np.empty(sum(part.num_rows for part in parts), _ID_DTYPE)
        num_found = 0
        for table in self._read_parts(parts, columns):
            found = content_id_array(_lasting(table)["content_id"])
            ids[num_found : num_found + len(found)] = found
            num_found += len(found)
        ids = ids[:num_found]
        ids.sort()
        return ids


def content_id_array(content_ids: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Content ids as a numpy array of 16-byte strings, comparable and sortable."""
    if isinstance(content_ids, pa.ChunkedArray):
        content_ids = content_ids.combine_chunks()
    start = content_ids.offset * _ID_DTYPE.itemsize
    raw = content_ids.buffers()[1]
    if raw is None:
        return np.empty(0, _ID_DTYPE)
    return np.frombuffer(raw, np.uint8, len(content_ids) * _ID_DTYPE.itemsize, start).view(_ID_DTYPE)


def contains(sorted_ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """A boolean mask: which wanted ids are among the sorted ids."""
    if not len(sorted_ids):
        return np.zeros(len(wanted), dtype=bool)
    positions = np.minimum(np.searchsorted(sorted_ids, wanted), len(sorted_ids) - 1)
    mask: np.ndarray = sorted_ids[positions] == wanted
    return mask


def _lasting(table: pa.Table) -> pa.Table:
    if "stage" not in table.column_names:
        return table
    return table.filter(pc.not_equal(table["stage"], Stage.FETCH.value))
