"""Which rows of a dataset advice looks at: to learn from, to judge by, and to look for duplicates among."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from convoy.core.epochs import rows_by_class
from convoy.core.errors import ConfigError, DataError
from convoy.core.randomness import generator
from convoy.core.records import Split
from convoy.pipelines.advise_config import AdviseConfig, LookSettings
from convoy.pipelines.feature_source import LabelledRows
from convoy.pipelines.natural_sample import natural_counts, natural_weights
from convoy.pipelines.probe_judging import JUDGING_FOLD, can_judge
from convoy.pipelines.training_rows import (
    RowLimit,
    count_classes,
    deal_fold,
    first_of_class,
    has_labels,
    read_first_of_class,
    read_split,
    require_labelled_rows,
)
from convoy.storage.manifests import MANIFEST_SCHEMA, Manifest

# Of each class at least, however small its share: fewer teach nothing, and none says nothing.
_LEAST = {Split.TRAIN: 4, Split.VAL: 1, Split.TEST: 0}


@dataclass(frozen=True, slots=True, eq=False)
class LookRows:
    """The rows of a look: to learn from, to judge by, and held-out ones that only duplicates are looked for among.

    With `judges_by_fold` those that judge are rows of `train` which trainings, too, leave out to be measured on.
    The weights are those of a row of each class, 1 on average: they give classes of which more than their share is
    looked at the share that they have where a training learns, and where it is measured. `chance_top1` is what always
    naming the class of which a training has most gets of the judged rows.
    """

    train: pa.Table
    judged: pa.Table
    held_out: pa.Table
    train_weights_K: NDArray[np.float64]
    judged_weights_K: NDArray[np.float64]
    chance_top1: float
    judges_by_fold: bool

    @property
    def all(self) -> pa.Table:
        """Each of them once, in the order of the manifest."""
        return pa.concat_tables([self.train, self.judged, self.held_out]).sort_by("sample_id")

    @property
    def by_use(self) -> pa.Table:
        """All of them; a fold that trainings are measured on is the split `val`, whose place it takes."""
        if not self.judges_by_fold:
            return self.all
        split = MANIFEST_SCHEMA.field("split")
        judges = pa.array([Split.VAL.value] * self.judged.num_rows, split.type)
        judged = self.judged.set_column(MANIFEST_SCHEMA.names.index("split"), split, judges)
        return pa.concat_tables([self.train, judged, self.held_out]).sort_by("sample_id")

    @property
    def learnt_by_weight(self) -> LabelledRows:
        """Those to learn from, each with its own weight times that of its class."""
        rows = LabelledRows.of(self.train)
        weights_N = (rows.weights_N * self.train_weights_K[rows.labels_N]).astype(np.float32)
        return replace(rows, weights_N=weights_N)

    @property
    def judged_by_weight(self) -> LabelledRows:
        """Those to judge by: they weigh by their class alone, as all count alike where a training is measured."""
        rows = LabelledRows.of(self.judged)
        return replace(rows, weights_N=self.judged_weights_K[rows.labels_N])


def choose_look_rows(manifest: Manifest, config: AdviseConfig) -> LookRows:
    """The rows that are looked at, of those that a training would have: some of each class, first by a hash of ids.

    Each class has its share, or a few where that is less. Judged are rows of `val`, or, where it cannot judge, a fifth
    of the rows of `train`. DataError for a class without images to learn from, or whose images all have weight 0, and
    where all judged rows are of one class; ConfigError where `look.max_rows` cannot hold a few of each.
    """
    require_labelled_rows(manifest, Split.TRAIN)
    look, limit = config.look, config.rows
    every = RowLimit(seed=limit.seed)
    most = _share_out(manifest, look, limit)
    train = looked = _sample(manifest, Split.TRAIN, limit, most, look.seed)
    counts_K = images_by_class(manifest, limit)
    train_weights_K = _weights(looked, counts_K)
    judges_by_val = has_judges(manifest, look)
    if judges_by_val:
        judged = _sample(manifest, Split.VAL, every, most, look.seed)
        judged_weights_K = _weights(judged, manifest.counts[Split.VAL].by_class)
    else:
        train, judged = deal_fold(manifest, looked, every.model_copy(update={"fold": JUDGING_FOLD}))
        # Held-out rows are as uneven as the dataset, also where a training learns from fewer.
        measured = every if has_held_out(manifest) else limit
        judged_weights_K = _weights(looked, images_by_class(manifest, measured))
    count_classes(train, manifest.classes)
    _check_weights(train, manifest)
    _check_judges(judged, manifest)
    held_out = [
        _sample(manifest, split, every, most, look.seed)
        for split in ((Split.TEST,) if judges_by_val else (Split.VAL, Split.TEST))
        if has_labels(manifest, split)
    ]
    return LookRows(
        train=train,
        judged=judged,
        held_out=pa.concat_tables([train.slice(0, 0), *held_out]),
        train_weights_K=train_weights_K,
        judged_weights_K=judged_weights_K,
        chance_top1=_chance(counts_K, judged, judged_weights_K),
        judges_by_fold=not has_held_out(manifest),
    )


def _share_out(manifest: Manifest, look: LookSettings, limit: RowLimit) -> dict[Split, int]:
    """How many rows of each split are looked at: `max_rows` of all together, or fewer."""
    counts: dict[Split, Sequence[int]] = {
        split: images_by_class(manifest, limit) if split is Split.TRAIN else manifest.counts[split].by_class
        for split in _LEAST
        if has_labels(manifest, split)
    }
    num_classes = len(manifest.classes)
    per_class = dict.fromkeys(counts, look.judged_per_class) | {Split.TRAIN: look.images_per_class}
    wanted = {split: min(per_class[split] * num_classes, sum(counts[split])) for split in counts}
    whole = sum(wanted.values())
    most = {split: number * min(look.max_rows, whole) // whole for split, number in wanted.items()}
    needed = {split: sum(min(count, _LEAST[split]) for count in counts[split]) for split in counts}
    if any(most[split] < needed[split] for split in counts):
        enough = max(math.ceil(needed[split] * whole / wanted[split]) for split in counts)
        raise ConfigError(
            f"{look.max_rows} images cannot hold {_LEAST[Split.TRAIN]} of each of {num_classes} classes to learn from"
            f" and {_LEAST[Split.VAL]} to judge by",
            where="look.max_rows",
            next_step=f"set look.max_rows to {enough} or more",
        )
    return most


def _sample(
    manifest: Manifest, split: Split, limit: RowLimit, most: Mapping[Split, int], seed: int
) -> pa.Table:
    """Some of the rows that a training has of a split; `seed` draws which, and not which ones it has.

    In memory are about as many, or those of the limit.
    """
    counts_K = images_by_class(manifest, limit) if split is Split.TRAIN else manifest.counts[split].by_class
    most_K = natural_counts(counts_K, most[split], least=_LEAST[split])
    if limit.max_per_class is None:
        return read_first_of_class(manifest, split, most_K, seed=seed)
    return first_of_class(read_split(manifest, split, limit), most_K, seed=seed)


def _weights(looked: pa.Table, counts_K: Sequence[int]) -> NDArray[np.float64]:
    looked_K = np.bincount(looked["label"].to_numpy(), minlength=len(counts_K))
    return natural_weights(np.array(counts_K), looked_K)


def _chance(counts_K: Sequence[int], judged: pa.Table, judged_weights_K: NDArray[np.float64]) -> float:
    """The share of judged rows that is of the class with most training images; of several such the mean."""
    judged_K = np.bincount(judged["label"].to_numpy(), minlength=len(counts_K)) * judged_weights_K
    return float(judged_K[np.array(counts_K) == max(counts_K)].mean() / judged_K.sum())


def images_by_class(manifest: Manifest, limit: RowLimit) -> list[int]:
    """How many images of each class a training has under a limit."""
    most = limit.max_per_class
    return [count if most is None else min(count, most) for count in manifest.counts[Split.TRAIN].by_class]


def has_judges(manifest: Manifest, look: LookSettings) -> bool:
    """Whether the split `val` can judge what was looked at."""
    return can_judge(manifest, look.least_judged)


def has_held_out(manifest: Manifest) -> bool:
    """Whether trainings are measured on labelled rows of `test` or `val`, and not on a fold of `train`."""
    return any(has_labels(manifest, split) for split in (Split.VAL, Split.TEST))


def subset_rows(labels_N: NDArray[np.int64], per_class: int, *, seed: int, repeat: int) -> NDArray[np.intp]:
    """So many rows of the largest class, and its share of every other, one at least, in order.

    One seed and repeat draw larger sets that hold the smaller.
    """
    largest = int(np.bincount(labels_N).max())
    chosen = []
    for label, members in rows_by_class(labels_N).items():
        order = generator(seed, "curve", repeat, label).permutation(len(members))
        chosen.append(members[order[: max(round(len(members) * per_class / largest), 1)]])
    rows: NDArray[np.intp] = np.sort(np.concatenate(chosen))
    return rows


def missing_classes(rows: pa.Table, classes: Sequence[str]) -> list[str]:
    """The classes of which a table has no row."""
    known = set(rows["label"].to_pylist())
    return [name for label, name in enumerate(classes) if label not in known]


def _check_weights(train: pa.Table, manifest: Manifest) -> None:
    missing = missing_classes(train.filter(pc.greater(train["weight"], 0)), manifest.classes)
    if missing:
        raise DataError(
            f"all images of '{missing[0]}' that are learnt from have a weight of 0"
            + (f" ({len(missing)} such classes)" if missing[1:] else ""),
            where=manifest.uri,
            next_step="give some of them a weight above 0, or raise look.images_per_class and look.max_rows",
        )


def _check_judges(judged: pa.Table, manifest: Manifest) -> None:
    missing = missing_classes(judged, manifest.classes)
    if len(manifest.classes) - len(missing) < 2:
        raise DataError(
            f"all {judged.num_rows} images that judge are of one class, none is of '{missing[0]}'"
            + (f" ({len(missing)} such classes)" if missing[1:] else ""),
            where=manifest.uri,
            next_step="freeze the dataset with a larger val_fraction, or add images of the classes that lack them",
        )
