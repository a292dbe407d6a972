"""The labelled rows that a training sees, and those by which it is watched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from convoy.core.config import StrictModel
from convoy.core.epochs import rows_by_class
from convoy.core.errors import ConfigError, DataError
from convoy.core.fingerprints import digest
from convoy.core.randomness import unit_interval
from convoy.core.records import Split
from convoy.storage.manifests import MANIFEST_SCHEMA, Manifest
from convoy.vision.training_config import Balance

# From this ratio between the largest and the smallest class on, `balance: auto` weighs the classes.
UNBALANCED_FROM = 3.0


class Fold(StrictModel):
    """One of `count` parts of the training rows; `index` counts from 0."""

    index: NonNegativeInt
    count: Annotated[int, Field(ge=2)]

    @model_validator(mode="after")
    def _is_one_of_them(self) -> Self:
        if self.index >= self.count:
            raise ValueError(f"folds count from 0, so the last of {self.count} is {self.count - 1}")
        return self


class RowLimit(StrictModel):
    """Which rows of the split `train` a training learns from: all of them, or fewer.

    `max_per_class`: at most so many images of each class, drawn by a hash of sample id and seed. For learning curves
    and few-shot measurements; a larger limit with the same seed only adds images. `fold` leaves one of several parts
    out, which takes the place of the validation rows (k-fold cross-validation).
    """

    max_per_class: PositiveInt | None = None
    fold: Fold | None = None
    seed: NonNegativeInt = 0

    @property
    def without_fold(self) -> RowLimit:
        """The rows of all folds together."""
        return self.model_copy(update={"fold": None})

    def within(self, outer: RowLimit) -> RowLimit:
        """The same limit on rows that `outer` leaves: of all folds of it, where it has any."""
        if outer.max_per_class is None:
            return self
        most = min(outer.max_per_class, self.max_per_class or outer.max_per_class)
        return self.model_copy(update={"max_per_class": most, "seed": outer.seed})


def has_labels(manifest: Manifest, split: Split) -> bool:
    """Whether a split is there and has a labelled row."""
    counts = manifest.counts.get(split)
    return counts is not None and any(counts.by_class)


def require_labelled_rows(manifest: Manifest, split: Split) -> None:
    """DataError where a split is not there or has no labelled row."""
    if not has_labels(manifest, split):
        raise DataError(
            f"no labelled sample in split {split.value}",
            where=manifest.uri,
            next_step="label the dataset, or choose another split",
        )


def read_split(manifest: Manifest, split: Split, limit: RowLimit | None = None) -> pa.Table:
    """The labelled rows of a split with all columns of the manifest, in its order: about 250 bytes a row.

    With a limit those that it leaves, without the rows of its fold. Raises DataError where there is none.
    """
    require_labelled_rows(manifest, split)
    limit = limit or RowLimit()
    if limit.max_per_class is None:
        rows = manifest.read_table(splits=[split])
        rows = rows.filter(pc.is_valid(rows["label"]))
    else:
        most_K = [limit.max_per_class] * len(manifest.classes)
        rows = read_first_of_class(manifest, split, most_K, seed=limit.seed)
    return rows if limit.fold is None else deal_fold(manifest, rows, limit)[0]


def fold_rows(manifest: Manifest, limit: RowLimit) -> pa.Table:
    """The rows of the limit's fold, in the order of the manifest: those that `read_split` leaves out.

    The folds of one count and seed are disjoint and hold every training row. Each class is dealt out to them evenly,
    in the order of a hash of sample id and seed; rows of equal content stay together, as far as the manifest knows it
    (see `fold_notes`). Raises DataError for a class that is too small to be in a fold and outside of it.
    """
    if limit.fold is None:
        raise ConfigError("the rows are in no fold", where="rows.fold", next_step="name a fold")
    return deal_fold(manifest, read_split(manifest, Split.TRAIN, limit.without_fold), limit)[1]


def row_notes(manifest: Manifest, limit: RowLimit) -> list[str]:
    """What a person should know of the rows that a training learns from: how many have no label, and of their folds."""
    counts = manifest.counts[Split.TRAIN]
    if not counts.num_unlabelled:
        return fold_notes(manifest, limit)
    unlabelled = (
        f"{counts.num_unlabelled:,} of {counts.num_samples:,} training images have no label and are left out"
    )
    return [unlabelled, *fold_notes(manifest, limit)]


def fold_notes(manifest: Manifest, limit: RowLimit) -> list[str]:
    """What a person should know of the limit's folds: whether equal images may lie in several of them.

    What the bytes of the images would say is not asked, as it comes to be known between the trainings of the folds.
    """
    if limit.fold is None:
        return []
    batches = manifest.iter_batches(["checksum"], splits=[Split.TRAIN])
    num_unknown = sum(batch["checksum"].null_count for batch in batches)
    if not num_unknown:
        return []
    return [
        f"equal images are kept in one fold only where checksums are known, and those of {num_unknown} training images"
        " are not: a copy in another fold is learnt, and then asked for (convoy cache counts duplicates)"
    ]


def deal_fold(manifest: Manifest, rows: pa.Table, limit: RowLimit) -> tuple[pa.Table, pa.Table]:
    """Some training rows outside the limit's fold, and those in it; DataError as `fold_rows`."""
    is_in_fold = _is_in_fold(manifest, rows, limit)
    return rows.filter(pa.array(~is_in_fold)), rows.filter(pa.array(is_in_fold))


def has_validation_rows(manifest: Manifest, limit: RowLimit) -> bool:
    """Whether a training is watched by labelled rows."""
    return limit.fold is not None or has_labels(manifest, Split.VAL)


def validation_rows(manifest: Manifest, limit: RowLimit) -> pa.Table | None:
    """The labelled rows by which a training is watched: its fold, or `val`, or None where `val` has no label."""
    if not has_validation_rows(manifest, limit):
        return None
    return read_split(manifest, Split.VAL) if limit.fold is None else fold_rows(manifest, limit)


def _is_in_fold(manifest: Manifest, rows: pa.Table, limit: RowLimit) -> NDArray[np.bool_]:
    fold = limit.fold
    if fold is None:
        return np.zeros(rows.num_rows, dtype=bool)
    draws_N = np.array([unit_interval(limit.seed, "fold", name) for name in rows["sample_id"].to_pylist()])
    labels_N = rows["label"].to_numpy()
    contents_N = rows["content_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    folds_N = np.empty(rows.num_rows, np.int64)
    num_dealt = 0
    for label, members in rows_by_class(labels_N).items():
        places, num_contents = _places(draws_N[members], contents_N[members])
        if num_contents < 2:
            raise DataError(
                f"class {manifest.classes[label]} has one training image: it cannot be in a fold and outside of it",
                where=manifest.uri,
                next_step="add images of it, or freeze the dataset without it",
            )
        # Each class goes on where the one before it ended, so that folds are equally large.
        folds_N[members] = (num_dealt + places) % fold.count
        num_dealt += num_contents
    if num_dealt < fold.count:
        raise DataError(
            f"{num_dealt} training images cannot fill {fold.count} folds",
            where=manifest.uri,
            next_step="make fewer folds, or add images",
        )
    is_in_fold: NDArray[np.bool_] = folds_N == fold.index
    return is_in_fold


def _places(draws_N: NDArray[np.float64], contents_N: NDArray[np.int32]) -> tuple[NDArray[np.int64], int]:
    """Each row's place in the order of the draws, and how many there are; rows of equal content share one.

    In two folds they would be learnt by heart in one and asked for in the other.
    """
    order = np.argsort(draws_N, kind="stable")
    _, first, group = np.unique(contents_N[order], return_index=True, return_inverse=True)
    places_N = np.empty(len(order), np.int64)
    places_N[order] = np.argsort(np.argsort(first))[group]
    return places_N, len(first)


def first_of_class(rows: pa.Table, most_K: Sequence[int] | NDArray[np.int64], *, seed: int) -> pa.Table:
    """At most so many labelled rows of each class, those first by a hash of sample id and seed, in their order."""
    draws_N = np.array([unit_interval(seed, "rows", name) for name in rows["sample_id"].to_pylist()])
    labels_N = rows["label"].to_numpy()
    kept = [
        members[np.argsort(draws_N[members])[: most_K[label]]]
        for label, members in rows_by_class(labels_N).items()
    ]
    return rows.take(pa.array(np.sort(np.concatenate([np.empty(0, np.int64), *kept]))))


def read_first_of_class(
    manifest: Manifest, split: Split, most_K: Sequence[int] | NDArray[np.int64], *, seed: int
) -> pa.Table:
    """`first_of_class` of the rows of a split. In memory are a few times as many as it leaves, and one batch."""
    first, others = MANIFEST_SCHEMA.empty_table(), MANIFEST_SCHEMA.empty_table()
    for batch in manifest.iter_batches(splits=[split]):
        rows = pa.Table.from_batches([batch.filter(pc.is_valid(batch["label"]))]).cast(MANIFEST_SCHEMA)
        others = pa.concat_tables([others, rows])
        # As many as are left at a time: each costs a hash whenever it is compared.
        if others.num_rows >= first.num_rows:
            first = first_of_class(pa.concat_tables([first, others]), most_K, seed=seed).combine_chunks()
            others = others.slice(0, 0)
    return first_of_class(pa.concat_tables([first, others]), most_K, seed=seed).combine_chunks()


def rows_digest(rows: pa.Table) -> str:
    """A digest of which rows these are, in their order."""
    return digest(rows["sample_id"].to_pylist())


def count_classes(rows: pa.Table, classes: Sequence[str]) -> list[int]:
    """Rows of each class. Raises DataError for classes without any: nothing can learn them; and for a single class."""
    if len(classes) < 2:
        raise DataError(
            f"the dataset has a single class, {', '.join(classes)}: there is nothing to tell it from",
            next_step="freeze a source with two classes or more; one of class folders may be one folder too high",
        )
    counts = np.bincount(rows["label"].to_numpy(), minlength=len(classes))
    empty = [name for name, count in zip(classes, counts, strict=True) if not count]
    if empty:
        raise DataError(
            f"{len(empty)} classes have no training image: {', '.join(empty[:5])}",
            next_step="add images of them, or freeze the dataset without these classes",
        )
    return [int(count) for count in counts]


def settle_balance(wanted: Balance, counts: Sequence[int]) -> Balance:
    """What is done about classes of so many images each, where `auto` is wanted too."""
    if wanted is not Balance.AUTO:
        return wanted
    return Balance.WEIGHTS if max(counts) >= UNBALANCED_FROM * min(counts) else Balance.NONE


def balance_notes(wanted: Balance, counts: Sequence[int]) -> list[str]:
    """The same in words; nothing where nothing is done."""
    balance = settle_balance(wanted, counts)
    if balance is Balance.NONE:
        return []
    return [f"classes are balanced by {balance.value}: {min(counts)} to {max(counts)} images"]


def with_mean_weight_one(rows: pa.Table) -> pa.Table:
    """The rows with weights of a mean of 1, so that their scale is no learning rate; equal ones become exactly 1.

    Raises DataError where no row counts.
    """
    weights_N = rows["weight"].to_numpy().astype(np.float64)
    mean = weights_N.mean()
    if mean == 0:
        raise DataError(
            f"all {rows.num_rows} training images have a weight of 0",
            next_step="give weights above 0 to what shall be learnt, or leave the column out",
        )
    place = rows.schema.get_field_index("weight")
    column = rows.schema.field(place)
    return rows.set_column(place, column, pa.array((weights_N / mean).astype(np.float32), column.type))


def weigh_classes(rows: pa.Table, classes: Sequence[str]) -> list[float]:
    """The weights of each class's rows together: their number where all weights are 1."""
    labels_N, weights_N = rows["label"].to_numpy(), rows["weight"].to_numpy()
    return [float(one) for one in np.bincount(labels_N, weights_N, minlength=len(classes))]


def class_weights(totals: Sequence[float]) -> tuple[float, ...]:
    """One weight a class, inverse to what its images count together, with a mean of 1 over them, as in scikit-learn.

    A class whose images count nothing has 0.
    """
    share = sum(totals) / sum(total > 0 for total in totals)
    return tuple(share / total if total else 0.0 for total in totals)
