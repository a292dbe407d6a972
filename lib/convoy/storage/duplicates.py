"""Exact duplicates, found by the digests of the bytes that were read: leaks between splits, label conflicts."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from convoy.core.config import StrictModel
from convoy.core.records import Split
from convoy.storage.feature_cache import FeatureCache, contains, content_id_array
from convoy.storage.manifests import Manifest
from convoy.storage.object_store import ObjectStore

_NUM_EXAMPLES, _NUM_NAMED = 10, 10


class DuplicateReport(StrictModel):
    """Groups of samples with the very same bytes. `examples` names the first samples of some of the worst groups."""

    groups: int
    samples: int
    across_splits: int
    label_conflicts: int
    examples: list[list[str]]


def find_duplicates(
    store: ObjectStore,
    manifest: Manifest,
    set_id: str,
    among: pa.Table | None = None,
    *,
    splits: Collection[Split] | None = None,
) -> DuplicateReport:
    """Exact duplicates among the samples of a manifest that a feature set has rows for, of all splits or of some.

    With `among`, rows of the manifest, they are those among these rows alone, whatever their split.
    Groups that disagree on the label or cross splits come first among the examples, then the largest.
    """
    having = None if among is None else np.sort(content_id_array(among["content_id"]))
    content = content_digests(FeatureCache(store), set_id, having)

    def read(*columns: str) -> Iterator[tuple[pa.Table, np.ndarray]]:
        if among is None:
            return _with_digests(manifest.iter_batches(columns, splits=splits), *content)
        # The rows themselves: others of the manifest may have their content ids.
        return _with_digests(among.select(columns).to_batches(), *content)

    # 16 bytes a sample find what is repeated; then some numbers a group, however large it is; then names of a few.
    digests = [digest for _, digest in read("content_id")]
    unique, counts = np.unique(np.concatenate(digests), return_counts=True)
    groups = _Groups(unique[counts > 1], counts[counts > 1])
    for table, digest in read("content_id", "label", "split"):
        groups.add(table, digest)
    worst = groups.worst()
    names: dict[bytes, list[str]] = {group: [] for group in worst.tolist()}
    for table, digest in read("sample_id", "content_id"):
        members = contains(np.sort(worst), digest)
        sample_ids = table["sample_id"].filter(pa.array(members)).to_pylist()
        for group, sample_id in zip(digest[members].tolist(), sample_ids, strict=True):
            if len(names[group]) < _NUM_NAMED:
                names[group].append(sample_id)
    return DuplicateReport(
        groups=len(groups.digests_G),
        samples=int(groups.sizes_G.sum()),
        across_splits=int(groups.crosses_G.sum()),
        label_conflicts=int(groups.conflicts_G.sum()),
        examples=list(names.values()),
    )


class _Groups:
    """Of each digest that samples share, in sorted order: how many they are, and what splits and labels they have."""

    def __init__(self, digests_G: np.ndarray, sizes_G: np.ndarray) -> None:
        self.digests_G, self.sizes_G = digests_G, sizes_G
        self._split_bits_G = np.zeros(len(digests_G), np.uint8)
        self._lowest_label_G = np.full(len(digests_G), np.iinfo(np.int32).max, np.int32)
        self._highest_label_G = np.full(len(digests_G), np.iinfo(np.int32).min, np.int32)

    def add(self, samples: pa.Table, digest_N: np.ndarray) -> None:
        """Look at samples with the digests of their bytes; those of no group are passed over."""
        members_N = contains(self.digests_G, digest_N)
        rows = samples.filter(pa.array(members_N))
        group_M = np.searchsorted(self.digests_G, digest_N[members_N])
        split_M = pc.index_in(rows["split"], pa.array(list(Split), pa.string())).to_numpy()
        np.bitwise_or.at(self._split_bits_G, group_M, np.left_shift(1, split_M).astype(np.uint8))
        has_label_M = pc.is_valid(rows["label"]).to_numpy(zero_copy_only=False)
        label_L = rows["label"].filter(pa.array(has_label_M)).to_numpy()
        np.minimum.at(self._lowest_label_G, group_M[has_label_M], label_L)
        np.maximum.at(self._highest_label_G, group_M[has_label_M], label_L)

    @property
    def crosses_G(self) -> np.ndarray:
        """Which groups are in several splits: those with more than one bit."""
        crosses_G: np.ndarray = self._split_bits_G & (self._split_bits_G - 1) != 0
        return crosses_G

    @property
    def conflicts_G(self) -> np.ndarray:
        """Which groups have several labels. Copies without one contradict nobody."""
        conflicts_G: np.ndarray = self._lowest_label_G < self._highest_label_G
        return conflicts_G

    def worst(self) -> np.ndarray:
        """The digests of a few groups, the worst first."""
        order_G = np.lexsort((-self.sizes_G, ~self.crosses_G, ~self.conflicts_G))
        worst: np.ndarray = self.digests_G[order_G[:_NUM_EXAMPLES]]
        return worst


def _with_digests(
    batches: Iterable[pa.RecordBatch], content_ids: np.ndarray, digests: np.ndarray
) -> Iterator[tuple[pa.Table, np.ndarray]]:
    """The samples whose bytes were read, and the digests of those bytes."""
    for batch in batches:
        known = contains(content_ids, content_id_array(batch["content_id"]))
        table = pa.table(batch).filter(pa.array(known))
        yield table, digests[np.searchsorted(content_ids, content_id_array(table["content_id"]))]


def content_digests(
    cache: FeatureCache, set_id: str, having: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Content ids of a set, sorted and unique, and the digest of the bytes of each.

    With `having`, sorted content ids, only these, and of parts with none of them nothing but ids is read.
    """
    ids, digests = [], []
    for table in cache.iter_parts(set_id, ["content_id", "content_digest"], having=having):
        part_ids = content_id_array(table["content_id"])
        wanted = slice(None) if having is None else contains(having, part_ids)
        ids.append(part_ids[wanted])
        digests.append(content_id_array(table["content_digest"])[wanted])
    if not ids:
        return np.empty(0, "S16"), np.empty(0, "S16")
    unique_ids, first = np.unique(np.concatenate(ids), return_index=True)
    return unique_ids, np.concatenate(digests)[first]
