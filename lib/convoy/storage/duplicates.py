"""Exact duplicates, found by the digests of the bytes that were read: leaks between splits, label conflicts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from convoy.core.config import StrictModel
from convoy.storage.feature_cache import FeatureCache, contains, content_id_array
from convoy.storage.manifests import Manifest
from convoy.storage.object_store import ObjectStore

_NUM_EXAMPLES = 10


class DuplicateReport(StrictModel):
    """Groups of samples with the very same bytes. `examples` names the samples of some of the worst groups."""

    groups: int
    samples: int
    across_splits: int
    label_conflicts: int
    examples: list[list[str]]


def find_duplicates(store: ObjectStore, manifest: Manifest, set_id: str) -> DuplicateReport:
    """Exact duplicates among the samples of a manifest that a feature set has rows for.

    Groups that cross splits or disagree on the label come first among the examples.
    """
    content = _digests_of_content(FeatureCache(store), set_id)
    # Two passes: 16 bytes a sample to find what is repeated, then whole rows of the repeated few only.
    digests = [digest for _, digest in _with_digests(manifest, ["content_id"], *content)]
    unique, counts = np.unique(np.concatenate(digests), return_counts=True)
    repeated = unique[counts > 1]
    groups: dict[bytes, list[dict[str, object]]] = {}
    for table, digest in _with_digests(manifest, ["sample_id", "content_id", "label", "split"], *content):
        members = contains(repeated, digest)
        rows = table.filter(pa.array(members)).to_pylist()
        for group, row in zip(digest[members].tolist(), rows, strict=True):
            groups.setdefault(group, []).append(row)
    return _report(groups)


def _with_digests(
    manifest: Manifest, columns: list[str], content_ids: np.ndarray, digests: np.ndarray
) -> Iterator[tuple[pa.Table, np.ndarray]]:
    """The manifest's samples whose bytes were read, and the digests of those bytes."""
    for batch in manifest.iter_batches(columns=columns):
        known = contains(content_ids, content_id_array(batch["content_id"]))
        table = pa.table(batch).filter(pa.array(known))
        yield table, digests[np.searchsorted(content_ids, content_id_array(table["content_id"]))]


def _digests_of_content(cache: FeatureCache, set_id: str) -> tuple[np.ndarray, np.ndarray]:
    """Content ids, sorted and unique, and the digest of the bytes of each."""
    ids, digests = [], []
    for table in cache.iter_parts(set_id, ["content_id", "content_digest"]):
        ids.append(content_id_array(table["content_id"]))
        digests.append(content_id_array(table["content_digest"]))
    if not ids:
        return np.empty(0, "S16"), np.empty(0, "S16")
    unique_ids, first = np.unique(np.concatenate(ids), return_index=True)
    return unique_ids, np.concatenate(digests)[first]


def _report(groups: dict[bytes, list[dict[str, object]]]) -> DuplicateReport:
    crossing = [group for group, rows in groups.items() if len({row["split"] for row in rows}) > 1]
    conflicting = [group for group, rows in groups.items() if len({row["label"] for row in rows}) > 1]
    worst = list(dict.fromkeys([*conflicting, *crossing, *groups]))[:_NUM_EXAMPLES]
    return DuplicateReport(
        groups=len(groups),
        samples=sum(len(rows) for rows in groups.values()),
        across_splits=len(crossing),
        label_conflicts=len(conflicting),
        examples=[[str(row["sample_id"]) for row in groups[group]] for group in worst],
    )
