"""What a refresh of a dataset changed."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from convoy.core.config import StrictModel
from convoy.core.records import Split
from convoy.storage.manifests import Manifest, label_names, with_long_columns
from convoy.storage.sources.rows import NUM_EXAMPLES

_COMPARED = ("sample_id", "content_id", "label", "split", "weight", "uri", "etag")


class ManifestChanges(StrictModel):
    """How a manifest differs from the one before, in samples, with the ids of some of them.

    `changed` samples have other content, another label, split or weight; `moved` ones have all the same at
    another place or in another version of their object. Of the changed ones `left_train` were in the split `train`
    and are in another one now.
    """

    added: int = 0
    changed: int = 0
    removed: int = 0
    moved: int = 0
    left_train: int = 0
    examples: dict[str, tuple[str, ...]] = Field(default_factory=dict)


def compare_samples(
    previous: Manifest | None, samples: pa.Table, classes: tuple[str, ...]
) -> ManifestChanges:
    """What rows of MANIFEST_SCHEMA, in any order, change in an earlier manifest."""
    if previous is None:
        return ManifestChanges(added=samples.num_rows)
    old = _comparable(previous.read_table(_COMPARED), previous.classes)
    new = _comparable(samples.select(_COMPARED), classes)
    position = pc.index_in(new["sample_id"], old["sample_id"])
    kept = new.filter(pc.is_valid(position))
    before = old.take(position.drop_null())
    is_changed = _differs(kept, before, ("content_id", "label", "split", "weight"))
    is_moved = pc.and_not(_differs(kept, before, ("uri", "etag")), is_changed)
    chosen = {
        "added": new.filter(pc.is_null(position)),
        "changed": kept.filter(is_changed),
        "removed": old.filter(pc.invert(pc.is_in(old["sample_id"], new["sample_id"]))),
        "moved": kept.filter(is_moved),
    }
    left_train = pc.and_(
        pc.equal(before["split"], Split.TRAIN.value), pc.not_equal(kept["split"], Split.TRAIN.value)
    )
    examples = {name: tuple(rows["sample_id"][:NUM_EXAMPLES].to_pylist()) for name, rows in chosen.items()}
    return ManifestChanges(
        **{name: rows.num_rows for name, rows in chosen.items()},
        left_train=pc.sum(left_train).as_py() or 0,
        examples={name: ids for name, ids in examples.items() if ids},
    )


def describe_moves(changes: ManifestChanges) -> Iterator[str]:
    """A warning where samples left `train`: models that learnt them are still there."""
    if changes.left_train:
        yield (
            f"{changes.left_train} samples left the split train: models that were trained on them look too good on the"
            " splits where these are now, so train again before you evaluate"
        )


def _comparable(rows: pa.Table, classes: tuple[str, ...]) -> pa.Table:
    # No class has the empty name, so it can stand for "no label", which null cannot when it is compared.
    names = pc.fill_null(label_names(rows, classes), "")
    return with_long_columns(rows.set_column(_COMPARED.index("label"), "label", names))


def _differs(rows: pa.Table, others: pa.Table, columns: tuple[str, ...]) -> pa.ChunkedArray:
    differs = pc.not_equal(rows[columns[0]], others[columns[0]])
    for column in columns[1:]:
        differs = pc.or_(differs, pc.not_equal(rows[column], others[column]))
    return differs
