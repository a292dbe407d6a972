"""Which rows of a dataset advice looks at: to learn from, to judge by, and to look for duplicates among."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from convoy.core.errors import DataError
from convoy.core.records import Split
from convoy.pipelines.advise_config import AdviseConfig, LookSettings
from convoy.pipelines.probe_judging import JUDGING_FOLD
from convoy.pipelines.training_rows import RowLimit, count_classes, fold_rows, has_labels, read_split
from convoy.storage.manifests import MANIFEST_SCHEMA, Manifest

_LEAST_PER_CLASS = 4


@dataclass(frozen=True, slots=True, eq=False)
class LookRows:
    """The rows of a look: to learn from, to judge by, and held-out ones that only duplicates are looked for among."""

    train: pa.Table
    judged: pa.Table
    held_out: pa.Table

    @property
    def all(self) -> pa.Table:
        """Each of them once, in the order of the manifest."""
        return pa.concat_tables([self.train, self.judged, self.held_out]).sort_by("sample_id")

    @property
    def by_use(self) -> pa.Table:
        """All of them, a judging fold of `train` being the split `val`, whose place it takes."""
        split = MANIFEST_SCHEMA.field("split")
        judges = pa.array([Split.VAL.value] * self.judged.num_rows, split.type)
        judged = self.judged.set_column(MANIFEST_SCHEMA.names.index("split"), split, judges)
        return pa.concat_tables([self.train, judged, self.held_out]).sort_by("sample_id")


def choose_rows(manifest: Manifest, config: AdviseConfig) -> LookRows:
    """The rows that are looked at: some of each class, by a hash of their ids, those first that a training would have.

    Judged are rows of `val`, or, where it cannot judge, a fifth of the rows of `train`. DataError for a class
    without images to learn from, or whose images all have weight 0, and where all judged rows are of one class.
    """
    look, limit = config.look, config.rows
    most = max(look.max_rows // max(len(manifest.classes), 1), _LEAST_PER_CLASS)
    wanted = min(look.images_per_class, most, limit.max_per_class or most)
    per_class = RowLimit(max_per_class=wanted, seed=limit.seed)
    judged_per_class = RowLimit(max_per_class=min(look.judged_per_class, most), seed=limit.seed)
    if has_judges(manifest, look):
        train = read_split(manifest, Split.TRAIN, per_class)
        judged = read_split(manifest, Split.VAL, judged_per_class)
    else:
        folded = per_class.model_copy(update={"fold": JUDGING_FOLD})
        train, judged = read_split(manifest, Split.TRAIN, folded), fold_rows(manifest, folded)
    count_classes(train, manifest.classes)
    _check_weights(train, manifest)
    _check_judges(judged, manifest)
    held_out = train.slice(0, 0)
    if has_labels(manifest, Split.TEST):
        held_out = read_split(manifest, Split.TEST, judged_per_class)
    return LookRows(train=train, judged=judged, held_out=held_out)


def images_by_class(manifest: Manifest, limit: RowLimit) -> list[int]:
    """How many images of each class a training has under a limit."""
    most = limit.max_per_class
    return [count if most is None else min(count, most) for count in manifest.counts[Split.TRAIN].by_class]


def has_judges(manifest: Manifest, look: LookSettings) -> bool:
    """Whether the split `val` has enough labelled rows to judge by, and of more than one class."""
    val = manifest.counts.get(Split.VAL)
    by_class = [] if val is None else val.by_class
    return sum(by_class) >= look.least_judged and sum(count > 0 for count in by_class) > 1


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
