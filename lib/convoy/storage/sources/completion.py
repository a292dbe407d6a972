"""From a source's rows to a manifest's: labels as numbers, a split for each sample, and what looks wrong."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from convoy.core.errors import DataError
from convoy.core.records import Split
from convoy.core.splits import SplitOptions, draw_split
from convoy.storage.manifests import MANIFEST_SCHEMA, count_samples
from convoy.storage.sources.rows import NUM_EXAMPLES, SourceScan, describe_examples


def complete_rows(scan: SourceScan, options: SplitOptions) -> tuple[pa.Table, tuple[str, ...]]:
    """The rows of MANIFEST_SCHEMA, in any order, and the classes.

    Classes keep the order that the source declares; else integers are sorted by value, and names by their
    UTF-8 bytes. Splits are drawn as `SplitOptions` say; without any label they are not, and all samples that
    the source gives no split are `test`. Raises DataError if only some samples of a split have a label.
    """
    rows = scan.samples
    _require_labels_of_all_or_none(rows)
    found = rows["label"].drop_null().unique().to_pylist()
    classes = scan.classes or tuple(order_classes(found))
    columns = {
        "label": pc.index_in(rows["label"], pa.array(classes, pa.string())),
        "split": _complete_splits(rows, options) if found else rows["split"].fill_null(Split.TEST.value),
    }
    for name, values in columns.items():
        rows = rows.set_column(rows.schema.get_field_index(name), name, values)
    return rows.cast(MANIFEST_SCHEMA), classes


def order_classes(names: Sequence[str]) -> list[str]:
    """Class names in their order: by value if all are integers, else by their UTF-8 bytes."""
    if all(name.isascii() and name.isdigit() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def find_problems(samples: pa.Table, classes: Sequence[str]) -> Iterator[str]:
    """Warnings about rows of MANIFEST_SCHEMA that may spoil training or its numbers, with counts."""
    counts = count_samples(samples, len(classes))
    labelled = {split: np.array(part.by_class) for split, part in counts.items() if any(part.by_class)}
    for split, part in counts.items():
        if labelled and part.num_unlabelled:
            yield f"{part.num_unlabelled} samples of {split.value} have no label"
    if labelled:
        if len(classes) == 1:
            yield f"there is only one class, '{classes[0]}': is the source one folder too high?"
        yield from _describe_alike(classes)
        totals = np.sum(list(labelled.values()), axis=0)
        yield from _describe_classes(classes, totals == 0, "without any sample")
        yield from _describe_classes(classes, totals == 1, "with a single sample")
        for split, by_class in labelled.items():
            yield from _describe_classes(classes, (by_class == 0) & (totals > 0), f"missing in {split.value}")
    yield from _describe_equal_content(samples)


def _require_labels_of_all_or_none(rows: pa.Table) -> None:
    for split in rows["split"].unique().to_pylist():
        part = rows.filter(pc.is_null(rows["split"]) if split is None else pc.equal(rows["split"], split))
        unlabelled = part.filter(pc.is_null(part["label"]))
        if 0 < unlabelled.num_rows < part.num_rows:
            examples = unlabelled["sample_id"][:NUM_EXAMPLES].to_pylist()
            raise DataError(
                f"samples without a label: {describe_examples(unlabelled.num_rows, examples)}; "
                f"{part.num_rows - unlabelled.num_rows} others of {split or 'the source'} have one",
                next_step="label them, move them away, or read no labels at all with --set reading.labels=none",
            )


def _complete_splits(rows: pa.Table, options: SplitOptions) -> pa.ChunkedArray:
    drawing = options.given({Split(name) for name in rows["split"].drop_null().unique().to_pylist()})
    chunks = []
    for batch in rows.select(["sample_id", "split"]).to_batches():
        named = zip(batch["sample_id"].to_pylist(), batch["split"].to_pylist(), strict=True)
        chunks.append([_split_of(sample_id, split, drawing) for sample_id, split in named])
    return pa.chunked_array(chunks, pa.string())


def _split_of(sample_id: str, named: str | None, options: SplitOptions) -> str:
    if named is None or named == Split.TRAIN:
        return draw_split(sample_id, options).value
    return named


def _describe_classes(classes: Sequence[str], chosen: np.ndarray, problem: str) -> Iterator[str]:
    names = [name for name, is_chosen in zip(classes, chosen, strict=True) if is_chosen]
    if names:
        yield f"classes {problem}: {describe_examples(len(names), names)} of {len(classes)}"


def _describe_alike(classes: Sequence[str]) -> Iterator[str]:
    names_of = defaultdict[str, list[str]](list)
    for name in classes:
        names_of["".join(name.split()).casefold()].append(name)
    alike = [" and ".join(map(repr, names)) for names in names_of.values() if len(names) > 1]
    if alike:
        yield f"class names that differ only in spaces or case: {describe_examples(len(alike), alike)}"


def _describe_equal_content(samples: pa.Table) -> Iterator[str]:
    groups = samples.group_by("content_id").aggregate(
        [([], "count_all"), ("label", "count_distinct"), ("split", "count_distinct")]
    )
    for column, problem in (("label", "different labels"), ("split", "several splits")):
        chosen = groups.filter(pc.greater(groups[f"{column}_count_distinct"], 1))
        if chosen.num_rows:
            same = samples.filter(pc.equal(samples["content_id"], chosen["content_id"][0]))
            examples = ", ".join(same["sample_id"][:NUM_EXAMPLES].to_pylist())
            yield f"{chosen.num_rows} images occur several times under {problem}, such as {examples}"
