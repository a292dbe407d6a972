"""The data card of a page: what a dataset holds, from its manifest and what jobs found out about its bytes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa

from convoy.core.config import StrictModel
from convoy.core.errors import ConvoyError
from convoy.core.records import Split
from convoy.pipelines.report_file_kinds import file_kinds
from convoy.pipelines.report_images import ShownImage, show_images
from convoy.pipelines.report_runs import newest_first
from convoy.pipelines.stratified_sample import stratified_rows
from convoy.storage.documents import read_json
from convoy.storage.duplicates import find_duplicates
from convoy.storage.manifests import Manifest
from convoy.storage.object_store import ObjectStore
from convoy.storage.runs import RunFolder

_NUM_EXAMPLES = 24
_MAX_SUFFIXES = 8
# Names may end in their number, which makes a suffix of each: beyond so many the rare ones count as others.
_MAX_COUNTED_SUFFIXES = 4096
# Runs that are looked at for a feature set, newest first.
_MAX_RUNS = 200
_NO_LABEL = "(no label)"


class ClassRows(StrictModel):
    """Samples of one class by split, and over all of them."""

    name: str
    by_split: dict[str, int]
    total: int


class SizeBin(StrictModel):
    """Images of at least `low_bytes` and less than `high_bytes`, a power of two each."""

    low_bytes: int
    high_bytes: int
    images: int


class LabelledImage(StrictModel):
    """An example of a class."""

    label_name: str
    split: str
    image: ShownImage


class FoundDuplicates(StrictModel):
    """Groups of equal images among those of some `splits`; `examples` names the samples of some of the worst.

    `unread_splits` are the others whose images may be the same. Where there are some, `across_splits` is the least
    number of groups in several splits, and null where none was found.
    """

    splits: list[Split]
    unread_splits: list[Split]
    groups: int
    samples: int
    across_splits: int | None
    label_conflicts: int
    examples: list[list[str]]


class DataCard(StrictModel):
    """A version of a dataset.

    `imbalance` is the largest class over the smallest of the train split, null where a class has no row there.
    `unknown_sizes` are images in parquet files, whose size is known only to who reads them. `duplicates` are exact
    ones among the images of the splits that cache jobs read, null before one did. `suffixes` are the commonest, and
    how many images have `others`.
    """

    name: str
    fingerprint: str
    is_current: bool
    source: str
    samples: int
    unlabelled: int
    splits: dict[str, int]
    classes: list[ClassRows]
    imbalance: float | None
    sizes: list[SizeBin]
    total_bytes: int
    smallest_bytes: int
    largest_bytes: int
    unknown_sizes: int
    suffixes: dict[str, int]
    duplicates: FoundDuplicates | None
    skipped: dict[str, int]
    warnings: list[str]
    changes: dict[str, Any]
    examples: list[LabelledImage]


def read_data_card(store: ObjectStore, name: str, manifest: Manifest) -> DataCard:
    """What is known of a version; of its rows one row group at a time is in memory."""
    header = manifest.header
    summary = read_json(store, manifest.key.replace("manifest.parquet", "summary.json")) or {}
    pointer = read_json(store, f"datasets/{name}/current.json") or {}
    return DataCard(
        name=name,
        fingerprint=header.fingerprint,
        is_current=pointer.get("fingerprint") == header.fingerprint,
        source=header.source,
        samples=header.num_samples,
        unlabelled=sum(counts.num_unlabelled for counts in header.counts.values()),
        splits={split.value: counts.num_samples for split, counts in header.counts.items()},
        classes=_classes(manifest),
        imbalance=_imbalance(manifest),
        duplicates=_duplicates(store, name, manifest),
        skipped=summary.get("skipped", {}),
        warnings=list(summary.get("warnings", ())),
        changes=summary.get("changes", {}),
        examples=_examples(manifest),
        **_sizes(manifest),
    )


def _classes(manifest: Manifest) -> list[ClassRows]:
    rows = []
    for index, name in enumerate(manifest.classes):
        by_split = {split.value: counts.by_class[index] for split, counts in manifest.counts.items()}
        rows.append(ClassRows(name=name, by_split=by_split, total=sum(by_split.values())))
    return rows


def _imbalance(manifest: Manifest) -> float | None:
    """Of the train split, or of the largest one where there is no train split."""
    counts = max(manifest.counts.items(), key=lambda item: (item[0].value == "train", item[1].num_samples))[1]
    smallest = min(counts.by_class, default=0)
    return max(counts.by_class) / smallest if smallest else None


def _sizes(manifest: Manifest) -> dict[str, Any]:
    """The fields of a card that need every row, by one pass over three columns."""
    bins: Counter[int] = Counter()
    suffixes: Counter[str] = Counter()
    total = unknown = largest = 0
    smallest: int | None = None
    for batch in manifest.iter_batches(["sample_id", "uri", "size_bytes"]):
        sizes_N = batch["size_bytes"].drop_null().to_numpy(zero_copy_only=False)
        unknown += batch.num_rows - len(sizes_N)
        suffixes.update(file_kinds(batch))
        if len(suffixes) > _MAX_COUNTED_SUFFIXES:
            suffixes = Counter(dict(suffixes.most_common(_MAX_COUNTED_SUFFIXES // 2)))
        if len(sizes_N):
            bins.update(np.floor(np.log2(np.maximum(sizes_N, 1))).astype(int).tolist())
            total += int(sizes_N.sum())
            largest = max(largest, int(sizes_N.max()))
            smallest = min(smallest if smallest is not None else largest, int(sizes_N.min()))
    shown = dict(suffixes.most_common(_MAX_SUFFIXES))
    others = manifest.num_samples - sum(shown.values())
    span = range(min(bins, default=0), max(bins, default=-1) + 1)
    return {
        "sizes": [
            SizeBin(low_bytes=2**power, high_bytes=2 ** (power + 1), images=bins[power]) for power in span
        ],
        "total_bytes": total,
        "smallest_bytes": smallest or 0,
        "largest_bytes": largest,
        "unknown_sizes": unknown,
        "suffixes": {**shown, "others": others} if others else shown,
    }


def _duplicates(store: ObjectStore, name: str, manifest: Manifest) -> FoundDuplicates | None:
    """By the newest features of all splits with labels, or else by the newest of any whole split."""
    wanted = _compared_splits(manifest)
    read = _splits_read(store, name, manifest, wanted)
    if not read:
        return None
    set_id = next((set_id for set_id, splits in read.items() if wanted <= splits), next(iter(read)))
    # Not all rows of the set: jobs may have added a sample of other splits to it.
    splits = [split for split in Split if split in read[set_id]]
    unread = [split for split in Split if split in wanted - read[set_id]]
    try:
        report = find_duplicates(store, manifest, set_id, splits=splits)
    except ConvoyError:
        return None
    return FoundDuplicates(
        **report.model_dump(exclude={"across_splits"}),
        splits=splits,
        unread_splits=unread,
        across_splits=(report.across_splits or None) if unread else report.across_splits,
    )


def _compared_splits(manifest: Manifest) -> set[Split]:
    """The splits of which all images must have been read before none is said to be in two of them."""
    labelled = {split for split, counts in manifest.counts.items() if any(counts.by_class)}
    return labelled if len(labelled) > 1 else set(manifest.counts)


def _splits_read(
    store: ObjectStore, name: str, manifest: Manifest, wanted: set[Split]
) -> dict[str, set[Split]]:
    """The splits of this very version that finished cache runs read, by feature set, newest first, until one has all.

    What was found among a sample of the rows, as advice and inspections take it, says nothing of the dataset.
    """
    about = {"dataset": name, "dataset_fingerprint": manifest.fingerprint}
    read: dict[str, set[Split]] = {}
    for folder, record in newest_first(store, RunFolder.record, most=_MAX_RUNS):
        if record is None or record.verb != "cache" or "rows" in record.identity:
            continue
        if about.items() <= record.identity.items() and folder.is_finished():
            splits = record.identity["splits"]
            for set_id in record.outputs:
                read.setdefault(set_id, set()).update(
                    manifest.counts if splits == "all" else map(Split, splits)
                )
            if any(wanted <= found for found in read.values()):
                break
    return read


def _examples(manifest: Manifest) -> list[LabelledImage]:
    """Some images, as evenly over the classes as it goes; which ones is up to a hash of their ids."""
    rows = choose_examples(manifest, _NUM_EXAMPLES)
    labels, splits = rows["label"].to_pylist(), rows["split"].to_pylist()
    return [
        LabelledImage(
            label_name=_NO_LABEL if label is None else manifest.classes[label], split=split, image=image
        )
        for label, split, image in zip(labels, splits, show_images(rows), strict=True)
    ]


def choose_examples(manifest: Manifest, num_rows: int) -> pa.Table:
    """Rows of all splits, one of each class before a second of any, sorted by class."""
    rows = stratified_rows(manifest, num_rows, splits=tuple(Split), purpose="data card")
    return rows.sort_by("label")
