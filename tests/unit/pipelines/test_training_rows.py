from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from sklearn.utils.class_weight import compute_class_weight

from convoy.core.config import parse_config
from convoy.core.errors import ConfigError, DataError
from convoy.core.records import Split
from convoy.pipelines import training_rows
from convoy.pipelines.folds import join_folds
from convoy.pipelines.training_rows import (
    Fold,
    RowLimit,
    class_weights,
    first_of_class,
    fold_notes,
    fold_rows,
    read_split,
    row_notes,
    validation_rows,
    weigh_classes,
    with_mean_weight_one,
)
from convoy.storage import manifests
from convoy.storage.local_store import LocalStore
from convoy.storage.manifests import (
    MANIFEST_SCHEMA,
    Manifest,
)
from convoy.storage.member_predictions import MemberLogits
from made_advice_rows import frozen_rows
from made_manifests import write_samples
from made_runs import content_id

CLASSES = ("cat", "dog", "owl")
COUNT = 4

Row = tuple[str, str, int | None, Split]


def made_manifest(folder: Path, rows: Sequence[Row]) -> Manifest:
    """A manifest of rows given as (sample id, name of the content, label, split)."""
    table = pa.Table.from_pylist(
        [
            {
                "sample_id": sample_id,
                "uri": f"/data/{sample_id}",
                "etag": "1",
                "content_id": content_id(content),
                "label": label,
                "split": split,
                "weight": 1.0,
            }
            for sample_id, content, label, split in rows
        ],
        MANIFEST_SCHEMA,
    )
    return write_samples(LocalStore(str(folder)), table, CLASSES)


def rows_of_classes(*sizes: int) -> list[Row]:
    """So many training rows of each class."""
    return [
        (f"{CLASSES[label]}{number:02d}", f"{label}/{number}", label, Split.TRAIN)
        for label, size in enumerate(sizes)
        for number in range(size)
    ]


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """23, 10 and 3 training rows; one unlabelled; two validation rows."""
    others: list[Row] = [
        ("mute", "mute", None, Split.TRAIN),
        *((f"val{label}", f"val{label}", label, Split.VAL) for label in (0, 1)),
    ]
    return made_manifest(tmp_path, rows_of_classes(23, 10, 3) + others)


def limit_of(index: int, count: int = COUNT, *, seed: int = 0, max_per_class: int | None = None) -> RowLimit:
    return RowLimit(fold=Fold(index=index, count=count), seed=seed, max_per_class=max_per_class)


def ids(rows: pa.Table) -> list[str]:
    names: list[str] = rows["sample_id"].to_pylist()
    return names


def test_folds_share_out_every_training_row_once(manifest: Manifest) -> None:
    folds = [ids(fold_rows(manifest, limit_of(index))) for index in range(COUNT)]
    everything = ids(read_split(manifest, Split.TRAIN))
    assert sorted(name for fold in folds for name in fold) == everything
    assert "mute" not in everything
    assert [len(fold) for fold in folds] == [9] * 4
    for index, fold in enumerate(folds):
        assert fold == sorted(fold)
        assert ids(read_split(manifest, Split.TRAIN, limit_of(index))) == [
            name for name in everything if name not in fold
        ]


def test_every_class_is_in_every_fold_as_far_as_its_rows_go(manifest: Manifest) -> None:
    counts = [Counter(name[:3] for name in ids(fold_rows(manifest, limit_of(index)))) for index in range(4)]
    assert sorted(count["cat"] for count in counts) == [5, 6, 6, 6]
    assert sorted(count["dog"] for count in counts) == [2, 2, 3, 3]
    assert sorted(count["owl"] for count in counts) == [0, 1, 1, 1]


def test_folds_depend_on_the_seed_and_on_the_ids_alone(manifest: Manifest, tmp_path: Path) -> None:
    first = ids(fold_rows(manifest, limit_of(1)))
    assert first == ids(fold_rows(manifest, limit_of(1)))
    assert first != ids(fold_rows(manifest, limit_of(1, seed=1)))
    shuffled = rows_of_classes(23, 10, 3)
    np.random.default_rng(0).shuffle(shuffled)  # type: ignore[arg-type]
    again = made_manifest(tmp_path / "again", shuffled)
    assert ids(fold_rows(again, limit_of(1))) == first


def test_folds_of_fewer_rows_hold_those_only(manifest: Manifest) -> None:
    limited = RowLimit(max_per_class=5)
    folds = [ids(fold_rows(manifest, limit_of(index, max_per_class=5))) for index in range(COUNT)]
    assert sorted(name for fold in folds for name in fold) == ids(read_split(manifest, Split.TRAIN, limited))
    assert sum(map(len, folds)) == 5 + 5 + 3


def test_folds_of_images_without_checksums_say_that_equal_ones_may_be_in_several(tmp_path: Path) -> None:
    manifest = made_manifest(tmp_path / "unknown", rows_of_classes(3, 2))
    (note,) = fold_notes(manifest, limit_of(0, 2))
    assert "those of 5 training images" in note
    assert fold_notes(manifest, RowLimit()) == []
    rows = manifest.read_table()
    checksums = pa.array(["md5:0"] * rows.num_rows)
    known = rows.set_column(rows.schema.get_field_index("checksum"), "checksum", checksums)
    store = LocalStore(str(tmp_path / "known"))
    assert fold_notes(write_samples(store, known, CLASSES), limit_of(0, 2)) == []


def test_training_images_without_a_label_are_told_of(tmp_path: Path) -> None:
    rows = [*rows_of_classes(3, 2), ("none", "none", None, Split.TRAIN), ("there", "there", None, Split.TEST)]
    manifest = made_manifest(tmp_path, rows)
    assert row_notes(manifest, RowLimit()) == ["1 of 6 training images have no label and are left out"]
    assert len(row_notes(manifest, limit_of(0, 2))) == 2


def test_equal_content_is_in_one_fold(tmp_path: Path) -> None:
    rows: list[Row] = [(f"{number:02d}", f"content {number % 5}", 0, Split.TRAIN) for number in range(20)]
    manifest = made_manifest(tmp_path, [*rows, ("a", "a", 1, Split.TRAIN), ("b", "b", 1, Split.TRAIN)])
    folds = [set(fold_rows(manifest, limit_of(index, 3))["content_id"].to_pylist()) for index in range(3)]
    for index, fold in enumerate(folds):
        assert fold
        assert all(fold.isdisjoint(other) for other in folds[:index])


def test_a_training_is_watched_by_its_fold_or_else_by_the_validation_rows(
    manifest: Manifest, tmp_path: Path
) -> None:
    watched = validation_rows(manifest, limit_of(2))
    assert watched is not None
    assert ids(watched) == ids(fold_rows(manifest, limit_of(2)))
    watched = validation_rows(manifest, RowLimit())
    assert watched is not None
    assert ids(watched) == ["val0", "val1"]
    bare = made_manifest(tmp_path / "bare", rows_of_classes(4, 4))
    assert validation_rows(bare, RowLimit()) is None
    assert validation_rows(bare, limit_of(0, 2)) is not None
    mute: list[Row] = [("mute", "mute", None, Split.VAL)]
    assert validation_rows(made_manifest(tmp_path / "mute", rows_of_classes(4, 4) + mute), RowLimit()) is None


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    lonely = made_manifest(tmp_path / "lonely", rows_of_classes(9, 1))
    for read in (fold_rows, validation_rows):
        with pytest.raises(DataError, match="class dog has one training image"):
            read(lonely, limit_of(0))
    with pytest.raises(DataError, match="class dog has one training image"):
        read_split(lonely, Split.TRAIN, limit_of(0))
    few = made_manifest(tmp_path / "few", rows_of_classes(2, 2))
    assert fold_rows(few, limit_of(3)).num_rows == 1
    with pytest.raises(DataError, match="4 training images cannot fill 5 folds"):
        fold_rows(few, limit_of(0, 5))


@pytest.mark.parametrize(
    "fold", [{"index": 3, "count": 3}, {"index": 0, "count": 1}, {"index": -1, "count": 2}]
)
def test_a_fold_that_does_not_exist_is_refused(fold: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        parse_config(RowLimit, {"fold": fold}, where="rows")


def test_no_fold_has_no_rows_of_its_own(manifest: Manifest) -> None:
    with pytest.raises(ConfigError, match="in no fold"):
        fold_rows(manifest, RowLimit())


def logits_of(*names: str) -> MemberLogits:
    """Logits that tell the rows apart, in two views of three classes."""
    values = np.array([float(name[1:]) for name in names], np.float32)
    logits_VNK = values[None, :, None] + np.array([[[0.0, 1, 2]], [[3, 4, 5]]], np.float32)
    return MemberLogits(sample_ids=names, labels_N=values.astype(np.int32), logits_MVNK=logits_VNK[None])


def test_folds_are_joined_in_the_order_of_the_rows() -> None:
    joined = join_folds(["s0", "s1", "s2", "s3"], [logits_of("s3", "s0"), logits_of("s2")], ["s1"])
    expected = logits_of("s0", "s2", "s3")
    assert tuple(joined.sample_ids) == expected.sample_ids
    assert joined.labels_N.tolist() == [0, 2, 3]
    np.testing.assert_array_equal(joined.logits_MVNK, expected.logits_MVNK)


@pytest.mark.parametrize(
    ("names", "rejected", "message"),
    [
        (["s0", "s1"], [], "1 are in none, 0 in several or no training rows, such as s2"),
        (["s0", "s1", "s2"], ["s1"], "0 are in none, 1 in several or no training rows, such as s1"),
        (["s0", "s1", "s2", "s7"], [], "0 are in none, 1 in several or no training rows, such as s7"),
        ([], ["s0", "s1", "s2"], "no row of any fold could be predicted"),
    ],
)
def test_rows_that_are_missing_or_double_are_refused(
    names: list[str], rejected: list[str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        join_folds(["s0", "s1", "s2"], [logits_of(*names)] if names else [], rejected)


def test_class_weights_are_those_of_scikit_learn() -> None:
    labels_N = np.repeat([0, 1, 2], [50, 7, 13])
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels_N)
    assert class_weights([50, 7, 13]) == pytest.approx(expected, rel=1e-6)


def weighted_rows(labels: Sequence[int], weights: Sequence[float]) -> pa.Table:
    return pa.table({"label": pa.array(labels, pa.int32()), "weight": pa.array(weights, pa.float32())})


def test_a_class_weighs_what_its_rows_do_and_its_weight_makes_up_for_that() -> None:
    rows = weighted_rows([0, 0, 1, 1, 1], [3.0, 3.0, 0.5, 1.0, 0.5])
    totals = weigh_classes(rows, ["cat", "dog"])
    assert totals == [6.0, 2.0]
    weights = class_weights(totals)
    assert [total * weight for total, weight in zip(totals, weights, strict=True)] == pytest.approx([4, 4])
    assert class_weights(weigh_classes(weighted_rows([0, 1, 1], [1, 1, 1]), "ab")) == class_weights([1, 2])
    assert class_weights([2.0, 6.0, 0.0]) == (2.0, pytest.approx(2 / 3), 0.0)


@pytest.mark.parametrize("weight", [1.0, 0.1, 100.0, 1e-30])
def test_equal_weights_become_exactly_one(weight: float) -> None:
    rows = pa.concat_tables([weighted_rows([0] * 1001, [weight] * 1001), weighted_rows([1], [weight])])
    scaled = with_mean_weight_one(rows)
    assert set(scaled["weight"].to_pylist()) == {1.0}
    assert scaled.schema == rows.schema
    assert scaled["label"] == rows["label"]


def test_weights_keep_their_ratios_and_have_a_mean_of_one() -> None:
    scaled = with_mean_weight_one(weighted_rows([0, 1, 1], [0.0, 100.0, 200.0]))
    assert scaled["weight"].to_pylist() == [0.0, 1.0, 2.0]


def test_rows_that_all_count_nothing_are_refused() -> None:
    with pytest.raises(DataError, match="all 2 training images have a weight of 0"):
        with_mean_weight_one(weighted_rows([0, 1], [0.0, 0.0]))


@pytest.mark.parametrize(("inner", "outer", "left"), [(2, 5, 2), (5, 2, 2), (None, 3, 3), (2, None, 2)])
def test_a_limit_within_another_leaves_none_but_its_rows(
    tmp_path: Path, inner: int | None, outer: int | None, left: int
) -> None:
    rows = [
        (f"{label}/{index}", f"{label}/{index}", label, Split.TRAIN)
        for label in range(3)
        for index in range(9)
    ]
    manifest = made_manifest(tmp_path, rows)
    all_of_outer = RowLimit(max_per_class=outer, seed=4)
    limit = RowLimit(max_per_class=inner, seed=1).within(all_of_outer)
    some, others = (
        read_split(manifest, Split.TRAIN, one)["sample_id"].to_pylist() for one in (limit, all_of_outer)
    )
    assert len(some) == 3 * left
    assert set(some) <= set(others)


@pytest.mark.parametrize("most", [1, 30, 400])
def test_the_rows_of_a_limit_are_those_of_the_whole_split_without_holding_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(manifests, "ROWS_PER_GROUP", 100)
    manifest = frozen_rows(tmp_path, {Split.TRAIN: (900, 90, 10), Split.VAL: (500, 0, 0)}, CLASSES)
    whole = read_split(manifest, Split.TRAIN)
    held = []

    def counted(rows: pa.Table, *given: object, **more: object) -> pa.Table:
        held.append(rows.num_rows)
        return first_of_class(rows, *given, **more)

    monkeypatch.setattr(training_rows, "first_of_class", counted)
    for seed in range(3):
        limited = read_split(manifest, Split.TRAIN, RowLimit(max_per_class=most, seed=seed))
        assert limited == first_of_class(whole, [most] * 3, seed=seed)
        assert max(held) <= 2 * limited.num_rows + 100
