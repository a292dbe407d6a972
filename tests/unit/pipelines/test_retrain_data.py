"""The rows of a retraining: which judge models, and that no training chose by them."""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from convoy.core.errors import DataError
from convoy.core.records import Split
from convoy.pipelines.committees import single_committee
from convoy.pipelines.retrain_config import DataChecks
from convoy.pipelines.retrain_data import Findings, look_for_losses
from convoy.pipelines.retrain_rows import RetrainRows, open_rows
from convoy.storage.local_store import LocalStore
from convoy.storage.manifests import MANIFEST_SCHEMA, Manifest
from convoy.storage.retrains import RetrainFolder
from made_bundles import made_classifier
from made_manifests import write_samples

CLASSES = ("cat", "dog")
DAY = "2026-01-05"
TRAIN, VAL, TEST = Split.TRAIN, Split.VAL, Split.TEST


def version(
    folder: Path,
    name: str,
    *rows: tuple[str, Split],
    dogs: Container[str] = "",
    classes: tuple[str, ...] = CLASSES,
) -> Manifest:
    """A version of a dataset from the content and the split of its rows, cats but for `dogs`."""
    samples = pa.Table.from_pylist(
        [
            {
                "sample_id": f"{number:03}",
                "uri": f"/images/{number:03}.png",
                "etag": content,
                "content_id": content.encode().ljust(16),
                "label": int(content in dogs),
                "split": split.value,
                "weight": 1.0,
            }
            for number, (content, split) in enumerate(rows)
        ],
        schema=MANIFEST_SCHEMA,
    )
    return write_samples(LocalStore(str(folder)), samples, classes, key=f"{name}.parquet", fingerprint=name)


def opened(
    manifest: Manifest,
    previous: Manifest | None,
    folder: RetrainFolder,
    held: Mapping[str, Manifest] | None = None,
    *,
    date: str,
    champion_classes: tuple[str, ...] = (),
    min_class_rows: int = 1,
) -> RetrainRows:
    """Rows that any number of judges will do for, unless a test says more."""
    return open_rows(
        manifest,
        previous,
        folder,
        held or {},
        date=date,
        champion_classes=champion_classes,
        min_class_rows=min_class_rows,
    )


def test_a_dataset_without_a_test_split_is_refused_though_it_has_val_rows(tmp_path: Path) -> None:
    manifest = version(tmp_path, "first", ("a", TRAIN), ("b", VAL))
    with pytest.raises(DataError, match="test_fraction"):
        opened(manifest, None, RetrainFolder(LocalStore(str(tmp_path)), "pets"), date=DAY)


def test_an_image_that_training_sees_too_is_none_of_the_newest_rows(tmp_path: Path) -> None:
    before = (("a", TRAIN), ("b", VAL), ("c", TEST))
    first = version(tmp_path, "first", *before)
    folder = RetrainFolder(LocalStore(str(tmp_path)), "pets")
    opened(first, None, folder, date="2026-01-01")
    twice = (("d", TRAIN), ("d", TEST), ("e", VAL), ("e", TEST), ("f", TEST))
    rows = opened(version(tmp_path, "second", *before, *twice), first, folder, date=DAY)
    assert [one.rstrip() for one in rows.newest.content_ids_N.tolist()] == [b"f"]


def test_rows_with_the_bytes_of_a_judge_are_found_where_the_store_knows_no_checksum(tmp_path: Path) -> None:
    names = (("d", TEST), ("a", TRAIN), ("b", TRAIN), ("c", VAL), ("e", TEST), ("f", TEST))
    first = version(tmp_path, "first", ("d", TEST))
    folder = RetrainFolder(LocalStore(str(tmp_path)), "pets")
    opened(first, None, folder, date="2026-01-01")
    rows = opened(version(tmp_path, "second", *names), first, folder, date=DAY)
    assert rows.num_leaks == 0
    # What is d under another name is learnt by no model, and e was seen by one as c; of f nothing is known.
    bytes_of = {"a": "1", "b": "4", "c": "5", "d": "4", "e": "5"}
    ids, digests = (
        np.array([one.encode().ljust(16) for one in column]) for column in zip(*bytes_of.items(), strict=True)
    )
    known = rows.known_by_bytes(ids, digests)
    assert known.num_leaks == 1
    assert known.training(TRAIN)["content_id"].to_pylist() == [b"a".ljust(16)]
    assert [one.rstrip() for one in known.newest.content_ids_N.tolist()] == [b"f"]


def test_rows_that_were_held_stay_a_batch_of_their_own_among_those_that_follow(tmp_path: Path) -> None:
    before = (("a", TRAIN), ("c", TEST))
    first = version(tmp_path, "first", *before)
    folder = RetrainFolder(LocalStore(str(tmp_path)), "pets")
    opened(first, None, folder, date="2026-01-01")
    bad = (*before, ("b", TRAIN), ("d", TRAIN))
    held = {
        "2026-01-02": version(tmp_path, "second", *bad),
        "2026-01-03": version(tmp_path, "third", *bad, ("e", TRAIN)),
    }
    # One of the two is taken away since.
    now = version(tmp_path, "now", *bad[:-1], ("e", TRAIN), ("f", TRAIN))
    rows = opened(now, first, folder, held, date=DAY)
    batches = {date: rows.chosen(one_N)["content_id"].to_pylist() for date, one_N in rows.held_N.items()}
    assert {date: [one.rstrip() for one in batch] for date, batch in batches.items()} == {
        "2026-01-02": [b"b"],
        "2026-01-03": [b"e"],
    }


def objections(today: Manifest, champions: Manifest, *, knows: tuple[str, ...] = CLASSES) -> list[str]:
    """What is objected to where a champion was made from another version and knows some classes."""
    champion = single_committee(made_classifier(today.store, 0, classes=knows), name="pets", digest="")
    findings = Findings()
    rows = opened(today, champions, RetrainFolder(today.store, "pets"), date=DAY)
    look_for_losses(rows, DataChecks(), champion, findings)
    return findings.objections


def test_rows_of_the_champion_and_of_the_holdout_that_are_gone_are_objected_to(tmp_path: Path) -> None:
    all_rows = [(f"{number}", TEST if number % 2 else TRAIN) for number in range(40)]
    first = version(tmp_path, "first", *all_rows)
    opened(first, None, RetrainFolder(first.store, "pets"), date="2026-01-01")
    left_36, left_24 = (version(tmp_path, f"left-{num}", *all_rows[:num]) for num in (36, 24))
    assert objections(left_36, first) == []
    assert [text[:20] for text in objections(left_24, first)] == [
        "16 of the 40 rows th",
        "8 of the 20 rows of ",
        "8 of the 20 rows of ",
    ]
    (gone,) = objections(left_36, first, knows=(*CLASSES, "truck"))
    assert gone == "the dataset has no truck any more, which the champion knows"


def cats_and_dogs(num_cats: int, num_dogs: int = 0) -> list[tuple[str, Split]]:
    """Every second row judges."""
    contents = [f"cat{number}" for number in range(num_cats)] + [f"dog{number}" for number in range(num_dogs)]
    return [(content, TEST if number % 2 else TRAIN) for number, content in enumerate(contents)]


def test_a_loss_that_a_champion_was_promoted_after_holds_no_later_date(tmp_path: Path) -> None:
    both = cats_and_dogs(100, 100)
    dogs = {content for content, _ in both if content.startswith("dog")}
    first = version(tmp_path, "first", *both, dogs=dogs)
    opened(first, None, RetrainFolder(first.store, "pets"), date="2026-01-01")
    no_dogs = version(tmp_path, "no-dogs", *cats_and_dogs(100), classes=("cat",))
    assert "50 of the 100 rows of the frozen holdout are gone" in objections(no_dogs, first)
    assert objections(no_dogs, no_dogs, knows=("cat",)) == []
    fewer_cats = version(tmp_path, "fewer-cats", *cats_and_dogs(70), classes=("cat",))
    assert objections(fewer_cats, no_dogs, knows=("cat",))[1:] == [
        "15 of the 50 rows of the frozen holdout are gone",
        "15 of the 50 rows of cat in the frozen holdout are gone",
    ]
    assert objections(fewer_cats, fewer_cats, knows=("cat",)) == []


@pytest.mark.parametrize("is_promoted", [False, True])
def test_small_losses_of_many_dates_are_objected_to_together(tmp_path: Path, is_promoted: bool) -> None:
    champions = version(tmp_path, "first", *cats_and_dogs(200))
    opened(champions, None, RetrainFolder(champions.store, "pets"), date="2026-01-01")
    for num_rows in (190, 180, 170, 160):
        today = version(tmp_path, f"left-{num_rows}", *cats_and_dogs(num_rows))
        assert objections(today, champions) == []
        champions = today if is_promoted else champions
    today = version(tmp_path, "left-150", *cats_and_dogs(150))
    assert "25 of the 100 rows of the frozen holdout are gone" in objections(today, champions)


def named(contents: object) -> list[str]:
    return sorted(one.rstrip().decode() for one in contents)  # type: ignore[attr-defined]


def test_test_rows_of_a_class_that_the_champion_learnt_later_join_the_holdout(tmp_path: Path) -> None:
    cats = (("a", TRAIN), ("b", TEST), ("c", TEST))
    first = version(tmp_path, "first", *cats)
    folder = RetrainFolder(LocalStore(str(tmp_path)), "pets")
    opened(first, None, folder, date="2026-01-01")
    dogs = (("e", TRAIN), ("f", TEST), ("f", VAL), ("g", TRAIN))
    second = version(tmp_path, "second", *cats, *dogs, ("d", TEST), dogs="defg")
    today = version(
        tmp_path,
        "today",
        *cats,
        *dogs[:-1],
        ("g", TEST),
        ("d", TEST),
        ("h", TEST),
        ("i", TEST),
        dogs="defghi",
    )

    def joined(
        date: str, previous: Manifest, champion_classes: tuple[str, ...] = CLASSES
    ) -> tuple[list[str], int]:
        rows = opened(today, previous, folder, date=date, champion_classes=champion_classes, min_class_rows=2)
        kept = zip(rows.holdout.content_ids_N.tolist(), rows.holdout.names_N, strict=True)
        by_class: dict[str, list[bytes]] = {"cat": [], "dog": []}
        for content, name in kept:
            by_class[name].append(content)
        assert named(by_class["cat"]) == ["b", "c"]
        return named(by_class["dog"]), rows.joined["dog"]

    # A class that no champion knows yet, and rows that are as new as their class, judge nobody.
    assert joined("2026-01-03", second, ("cat",)) == ([], 0)
    assert joined("2026-01-04", first) == ([], 0)
    # What a training saw, in its split of then (g) or under another name (f), never does.
    assert joined(DAY, second) == (["d"], 1)
    assert joined(DAY, second) == (["d"], 1)
    # A class that stays scarce is filled up, with one to spare, and no further.
    assert joined("2026-01-06", today) == (["d", "g", "h"], 2)
    assert joined("2026-01-07", today) == (["d", "g", "h"], 0)


def test_a_loss_of_judges_is_objected_to_before_others_take_their_place(tmp_path: Path) -> None:
    frozen = [(f"{number:02}", TEST) for number in range(25)]
    first = version(tmp_path, "first", ("a", TRAIN), *frozen)
    folder = RetrainFolder(LocalStore(str(tmp_path)), "pets")
    opened(first, None, folder, date="2026-01-01")
    later = [(f"{number}", TEST) for number in range(100, 200)]
    second = version(tmp_path, "second", ("a", TRAIN), *frozen, *later)
    today = version(tmp_path, "today", ("a", TRAIN), *frozen[:10], *later)
    rows = opened(today, second, folder, date=DAY, champion_classes=CLASSES, min_class_rows=20)
    findings = Findings()
    look_for_losses(rows, DataChecks(), None, findings)
    assert "15 of the 25 rows of the frozen holdout are gone" in findings.objections
    assert rows.joined.total() == 0
    # Once a champion was promoted after the loss, the class is watched by as many as before.
    rows = opened(today, today, folder, date="2026-01-06", champion_classes=CLASSES, min_class_rows=20)
    assert (rows.joined.total(), len(rows.holdout.names_N)) == (15, 25)
