"""The rows of a retraining: what was held out for good, and what is new."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from convoy.core.errors import DataError
from convoy.core.records import Split
from convoy.pipelines.retrain_scoring import NamedRows
from convoy.storage.feature_cache import contains, content_id_array
from convoy.storage.manifests import Manifest, label_names
from convoy.storage.retrains import HOLDOUT_SCHEMA, RetrainFolder

# A class whose last needed judge is lost would be watched no more.
_WITH_SPARES = 1.25
_COLUMNS = ("sample_id", "content_id", "label", "split", "weight")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RetrainRows:
    """A version of a dataset as a retraining sees it; some 80 bytes a row.

    `table` has the columns of the manifest that count here and `class`, the class name or null. `is_new_N` marks rows
    whose content and class were not in the version that the champion was made from, and `held_N` tells by date those
    of them that came with a version whose data was objected to. Rows are equal by `contents_N`, those of the holdout
    by `held_out_contents_H`: content ids or, after `known_by_bytes`, digests of the bytes. `holdout` are rows of the
    frozen holdout that the version still has, with the classes that were frozen; `frozen_by_class` counts all that were
    frozen, `remained_by_class` those of them that the champion's version still had (all where there is none),
    `lost_by_class` those of these that are gone since, and `joined` those that a date added.
    """

    manifest: Manifest
    table: pa.Table
    contents_N: NDArray[np.bytes_]
    is_new_N: NDArray[np.bool_]
    held_out_contents_H: NDArray[np.bytes_]
    is_held_out_N: NDArray[np.bool_]
    held_N: dict[str, NDArray[np.bool_]]
    holdout: NamedRows
    frozen_by_class: Counter[str]
    remained_by_class: Counter[str]
    lost_by_class: Counter[str]
    joined: Counter[str]
    num_before: int
    num_removed: int
    shared_classes: tuple[str, ...]

    def known_by_bytes(self, content_ids: NDArray[np.bytes_], digests: NDArray[np.bytes_]) -> RetrainRows:
        """The same rows, equal by the digests of sorted content ids: few stores tell that two names are one image."""
        contents_N = _known_digests(self.contents_N, content_ids, digests)
        held_out_H = _known_digests(self.held_out_contents_H, content_ids, digests)
        return replace(
            self,
            contents_N=contents_N,
            held_out_contents_H=held_out_H,
            is_held_out_N=self.is_held_out_N | np.isin(contents_N, held_out_H),
        )

    def training(self, split: Split) -> pa.Table:
        """The labelled rows of a split that are no rows of the holdout, nor equal to one."""
        wanted = pc.and_(pc.equal(self.table["split"], split.value), pc.is_valid(self.table["label"]))
        return self.table.filter(pc.and_(wanted, pa.array(~self.is_held_out_N)))

    @property
    def num_leaks(self) -> int:
        """Rows of the train split that are, or equal, rows of the holdout."""
        in_train_N = as_mask(pc.equal(self.table["split"], Split.TRAIN.value))
        return int((in_train_N & self.is_held_out_N).sum())

    @property
    def newest(self) -> NamedRows:
        """New labelled rows that no training ever sees: of the test split, and equal to no row that is elsewhere."""
        return named_rows(_unseen(self.table, self.contents_N, self.is_new_N & ~self.is_held_out_N))

    def chosen(self, is_chosen_N: NDArray[np.bool_]) -> pa.Table:
        """The rows of a mask."""
        return self.table.filter(pa.array(is_chosen_N))


def open_rows(
    manifest: Manifest,
    previous: Manifest | None,
    folder: RetrainFolder,
    held: Mapping[str, Manifest],
    *,
    date: str,
    champion_classes: Sequence[str],
    min_class_rows: int,
) -> RetrainRows:
    """Settle the holdout of the date, for good (`_settle_holdout`), and find what is new beside it.

    `previous` is the version of the champion, `held` are versions since then whose data was objected to, by date and
    oldest first. Raises DataError where no test row is labelled, or nothing of the holdout is left.
    """
    table = _read(manifest)
    pairs = _pairs(table)
    contents_N = content_id_array(table["content_id"])
    learnt = table.slice(0, 0) if previous is None else _read(previous)
    before = set(_pairs(learnt))
    is_new_N = np.array([pair not in before for pair in pairs], np.bool_)
    holdout, joined = _settle_holdout(
        folder,
        table,
        learnt,
        manifest,
        date=date,
        champion_classes=champion_classes,
        min_class_rows=min_class_rows,
    )
    kept = _still_there(table, holdout)
    if not kept.num_rows:
        raise DataError(
            "nothing of the model's frozen holdout is left in the dataset",
            where=manifest.uri,
            next_step="bring those images back, or retrain under another name",
        )
    remained = holdout if previous is None else _still_there(learnt, holdout)
    return RetrainRows(
        manifest=manifest,
        table=table,
        contents_N=contents_N,
        is_new_N=is_new_N,
        held_out_contents_H=content_id_array(holdout["content_id"]),
        is_held_out_N=_is_held_out(table, holdout),
        held_N=_held_back(pairs, is_new_N, held),
        holdout=NamedRows.of(kept["content_id"], kept["class"].to_pylist()),
        frozen_by_class=class_counts(holdout),
        remained_by_class=class_counts(remained),
        lost_by_class=class_counts(remained) - class_counts(_still_there(table, remained)),
        joined=Counter() if joined is None else class_counts(joined),
        num_before=len(before),
        num_removed=len(before - set(pairs)),
        shared_classes=tuple(dict.fromkeys([*manifest.classes, *holdout["class"].to_pylist()])),
    )


def _settle_holdout(
    folder: RetrainFolder,
    table: pa.Table,
    learnt: pa.Table,
    manifest: Manifest,
    *,
    date: str,
    champion_classes: Sequence[str],
    min_class_rows: int,
) -> tuple[pa.Table, pa.Table | None]:
    """The holdout as it is on a date, and what joined it then: the first time it is the labelled test rows, for good.

    Later, each class that the champion knows, and of which its version `learnt` had few frozen rows left, is filled
    up to a quarter more than `min_class_rows` by rows that were test rows already in that version: no model was
    trained on them, and neither today's data nor what was objected to can choose its judges. Raises DataError where no
    test row is labelled.
    """
    holdout = folder.holdout()
    if holdout is None:
        folder.freeze_holdout(_first_holdout(table, manifest))
    elif folder.joined_holdout(date) is None and (
        wanted := _scarce(_still_there(learnt, holdout), champion_classes, min_class_rows)
    ):
        were_unseen = set(_pairs(_unseen(learnt, content_id_array(learnt["content_id"]))))
        is_trusted_N = np.array([pair in were_unseen for pair in _pairs(table)], np.bool_)
        is_wanted_N = is_trusted_N & ~_is_held_out(table, holdout)
        joining = _some_of_each(_unseen(table, content_id_array(table["content_id"]), is_wanted_N), wanted)
        if joining.num_rows:
            folder.extend_holdout(date, joining.select(HOLDOUT_SCHEMA.names))
    settled = folder.holdout()
    assert settled is not None
    return settled, folder.joined_holdout(date)


def class_counts(table: pa.Table) -> Counter[str]:
    """How many rows each class has."""
    return Counter(table["class"].drop_null().to_pylist())


def _read(manifest: Manifest) -> pa.Table:
    table = manifest.read_table(_COLUMNS)
    return table.append_column("class", label_names(table, manifest.classes)).combine_chunks()


def _first_holdout(table: pa.Table, manifest: Manifest) -> pa.Table:
    """The test rows: training chooses by val rows, which could judge no model fairly."""
    wanted = pc.and_(pc.equal(table["split"], Split.TEST.value), pc.is_valid(table["label"]))
    rows = table.filter(wanted).select(HOLDOUT_SCHEMA.names)
    if not rows.num_rows:
        raise DataError(
            "no sample of the test split is labelled, so models could not be compared",
            where=manifest.uri,
            next_step="give the dataset a test split: --set splits.test_fraction=0.1",
        )
    return rows


def _is_held_out(table: pa.Table, holdout: pa.Table) -> NDArray[np.bool_]:
    """Which rows are, or equal, rows of the holdout."""
    same_id_N = as_mask(pc.is_in(table["sample_id"], holdout["sample_id"]))
    return same_id_N | np.isin(content_id_array(table["content_id"]), content_id_array(holdout["content_id"]))


def _known_digests(
    contents_N: NDArray[np.bytes_], content_ids: NDArray[np.bytes_], digests: NDArray[np.bytes_]
) -> NDArray[np.bytes_]:
    """The contents, but digests where those of their bytes are known; the ids are sorted."""
    is_known_N = contains(content_ids, contents_N)
    by_bytes_N = contents_N.copy()
    by_bytes_N[is_known_N] = digests[np.searchsorted(content_ids, contents_N[is_known_N])]
    return by_bytes_N


def _unseen(
    table: pa.Table, contents_N: NDArray[np.bytes_], is_wanted_N: NDArray[np.bool_] | None = None
) -> pa.Table:
    """The labelled test rows (among the wanted ones) that no training ever sees: equal to no row of another split."""
    in_test_N = as_mask(pc.equal(table["split"], Split.TEST.value))
    is_chosen_N = in_test_N & as_mask(pc.is_valid(table["label"]))
    if is_wanted_N is not None:
        is_chosen_N &= is_wanted_N
    is_learnt_N = np.isin(contents_N, contents_N[~in_test_N])
    return table.filter(pa.array(is_chosen_N & ~is_learnt_N))


def _scarce(holdout: pa.Table, classes: Sequence[str], min_class_rows: int) -> Counter[str]:
    """How many rows the holdout lacks of each class that has too few, with some to spare for images that are lost."""
    wanted = math.ceil(_WITH_SPARES * min_class_rows)
    return Counter(dict.fromkeys(classes, wanted)) - class_counts(holdout)


def _some_of_each(table: pa.Table, wanted: Counter[str]) -> pa.Table:
    """At most so many rows of each class and no content twice, by the order of their content ids: as good as random."""
    order = table.sort_by("content_id")
    left = wanted.copy()
    taken: list[int] = []
    before = None
    for row, (content, name) in enumerate(_pairs(order)):
        if left[str(name)] > 0 and content != before:
            taken.append(row)
            left[str(name)] -= 1
            before = content
    return order.take(pa.array(taken, pa.int64()))


def _still_there(table: pa.Table, holdout: pa.Table) -> pa.Table:
    """The rows of the holdout whose sample still has the same content."""
    position = pc.index_in(holdout["sample_id"], table["sample_id"])
    present = holdout.filter(pc.is_valid(position))
    now = table["content_id"].take(position.drop_null())
    return present.filter(pc.equal(present["content_id"], now))


def _held_back(
    pairs: Sequence[tuple[bytes, str | None]], is_new_N: NDArray[np.bool_], held: Mapping[str, Manifest]
) -> dict[str, NDArray[np.bool_]]:
    """Masks of the new rows that came with each of some versions, by date; a row is that of the first one."""
    batches = {}
    left_N = is_new_N.copy()
    for date, version in held.items():
        known = set(_pairs(_read(version)))
        came_N = left_N & np.array([pair in known for pair in pairs], np.bool_)
        left_N &= ~came_N
        if came_N.any():
            batches[date] = came_N
    return batches


def _pairs(table: pa.Table) -> list[tuple[bytes, str | None]]:
    return list(zip(table["content_id"].to_pylist(), table["class"].to_pylist(), strict=True))


def named_rows(table: pa.Table) -> NamedRows:
    """Labelled rows as they are scored."""
    return NamedRows.of(table["content_id"], table["class"].to_pylist())


def as_mask(values: pa.Array | pa.ChunkedArray) -> NDArray[np.bool_]:
    """Booleans without nulls in numpy."""
    return np.asarray(
        values.to_numpy(zero_copy_only=False) if isinstance(values, pa.Array) else values.to_numpy(), np.bool_
    )
