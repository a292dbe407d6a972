"""Which evaluated rows a model learnt from: a refresh of a dataset may have moved them to another split since."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from convoy.core.batching import batched
from convoy.core.errors import DataError
from convoy.core.records import Split
from convoy.pipelines.classifiers import Strategy
from convoy.pipelines.committees import CommitteeRecord
from convoy.pipelines.data_origin import dataset_of_model
from convoy.storage.bundles import BundleRef, peek_bundle
from convoy.storage.datasets import open_dataset
from convoy.storage.manifests import Manifest
from convoy.storage.object_store import ObjectStore

# Of the version that a model was trained on about a million rows are looked at in one pass over the evaluated ones.
_BATCHES_A_PASS = 64


def overlap_notes(
    store: ObjectStore,
    manifest: Manifest,
    dataset: str,
    splits: Collection[Split],
    committee: CommitteeRecord,
) -> list[str]:
    """A note for each member that was trained on another version of the dataset, on rows that it is measured on now."""
    refs = [
        member.bundle
        for member in committee.members
        if member.bundle is not None and member.classifier.strategy is not Strategy.AS_IS
    ]

    @cache
    def count(fingerprint: str) -> tuple[int, int, int]:
        return count_overlap(manifest, splits, open_dataset(store, dataset, fingerprint))

    notes = (_note(store, manifest, dataset, ref, count) for ref in refs)
    return [note for note in notes if note]


def count_overlap(manifest: Manifest, splits: Collection[Split], trained: Manifest) -> tuple[int, int, int]:
    """The labelled rows of some splits: all, those in `train` of another version, and those only in its `val`.

    Rows are the same that have the id or the content of each other. In memory are the ids of the rows of the splits,
    and of a million rows of the other version at a time.
    """
    columns = ["sample_id", "content_id"]
    rows = manifest.read_table([*columns, "label"], splits=splits)
    rows = rows.filter(pc.is_valid(rows["label"])).select(columns)
    learnt_N, chosen_by_N = (_is_in(rows, trained, split) for split in (Split.TRAIN, Split.VAL))
    return rows.num_rows, int(learnt_N.sum()), int((chosen_by_N & ~learnt_N).sum())


def _note(
    store: ObjectStore,
    manifest: Manifest,
    dataset: str,
    ref: BundleRef,
    count: Callable[[str], tuple[int, int, int]],
) -> str:
    name, fingerprint = dataset_of_model(store, peek_bundle(store, ref))
    if name != dataset or fingerprint in ("", manifest.fingerprint):
        return ""
    try:
        total, learnt, chosen_by = count(fingerprint)
    except DataError:
        return (
            f"{ref} was trained on version {fingerprint} of {dataset}, which is no longer in the workspace: nobody can"
            " say how many of these rows it learnt from"
        )
    if not learnt + chosen_by:
        return ""
    also = f", and {chosen_by} to its val split, by which it may have been chosen" if chosen_by else ""
    return (
        f"{ref} was trained on version {fingerprint} of {dataset}, where {learnt} of the {total} rows that it is"
        f" measured on here belong to the train split{also}: its figures are too good. Train it again on the dataset as"
        " it is, or freeze the dataset with the splits of that version"
    )


def _is_in(rows: pa.Table, trained: Manifest, split: Split) -> NDArray[np.bool_]:
    """Which rows are in a split of another version, by id or by content."""
    found_N = np.zeros(rows.num_rows, np.bool_)
    batches = trained.iter_batches(rows.column_names, splits=[split])
    for part in batched(batches, _BATCHES_A_PASS):
        for name in rows.column_names:
            known = pa.chunked_array([batch[name] for batch in part])
            found_N |= pc.is_in(rows[name], value_set=known).to_numpy()
    return found_N
