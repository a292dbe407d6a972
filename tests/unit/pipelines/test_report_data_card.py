"""The data card: what was found among some of the images is not said of all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convoy.core.records import Split
from convoy.pipelines import report_data_card
from convoy.pipelines.report_data_card import FoundDuplicates, read_data_card
from convoy.report.blocks import Facts
from convoy.report.data_sections import data_card_section
from convoy.storage.commits import feature_prefix, finish, part_key, publish, read_records, write_record
from convoy.storage.local_store import LocalStore
from convoy.storage.manifests import Manifest
from convoy.storage.parts import FeatureRows, write_features
from convoy.storage.run_input import freeze_input, missing_rows
from convoy.storage.runs import RunFolder, RunRecord
from made_advice_rows import frozen_rows
from made_manifests import write_samples
from made_runs import NOTHING, content_id, made_manifest, slice_record

SLICE = "0-000000"
TRAIN, TEST = [Split.TRAIN], [Split.TEST]


def leaky_rows(folder: Path, **options: Any) -> Manifest:
    """Every image of test is one of train, as `cache_run` reads them."""
    counts = {Split.TRAIN: (4, 4), Split.TEST: (2, 2)}
    return frozen_rows(folder, counts, ("good", "defect"), **options)


def cache_run(
    manifest: Manifest,
    date: str,
    splits: list[Split] | None = None,
    *,
    set_id: str = "f" * 32,
    num_rows: int | None = None,
    **identity: Any,
) -> None:
    """A finished cache run that read the first rows of splits; images of one class and number are the same."""
    store, rows = manifest.store, manifest.read_table(splits=splits).slice(0, num_rows)
    folder = RunFolder(store, f"{date}-000000-00000000")
    record = RunRecord.new(
        folder.run_id,
        verb="cache",
        identity={
            "dataset": "parts",
            "dataset_fingerprint": manifest.fingerprint,
            "splits": sorted(splits) if splits else "all",
            **identity,
        },
        config={},
        outputs={set_id: feature_prefix(set_id, folder.run_id)},
        groups=freeze_input(folder, missing_rows([rows], {set_id: NOTHING}), slice_rows=rows.num_rows),
    )
    folder.write_record(record)
    names = rows["sample_id"].to_pylist()
    features = FeatureRows(
        sample_ids=names,
        content_ids=rows["content_id"].to_pylist(),
        content_digests=[content_id(name.partition("/")[2]) for name in names],
        view=0,
        features_BD=np.zeros((len(names), 4), np.float32),
    )
    part = write_features(store, part_key(record.outputs[set_id], SLICE, "a0"), features, {})
    write_record(store, slice_record(SLICE, {set_id: part}, num_results=len(names), run_id=record.run_id))
    publish(folder, record, read_records(folder))
    finish(folder, {})


def found_in(manifest: Manifest) -> FoundDuplicates:
    found = read_data_card(manifest.store, "parts", manifest).duplicates
    assert found is not None
    return found


def shown(manifest: Manifest) -> dict[str, str]:
    """What the page says of duplicates."""
    blocks = data_card_section(read_data_card(manifest.store, "parts", manifest)).blocks
    (facts,) = (block for block in blocks if isinstance(block, Facts) and block.key == "duplicates")
    return dict(facts.rows)


def test_duplicates_are_those_of_whole_splits_and_never_of_a_sample_of_the_rows(tmp_path: Path) -> None:
    manifest = leaky_rows(tmp_path)
    cache_run(manifest, "20260102", num_rows=3, rows="digest of three rows")
    assert read_data_card(LocalStore(str(tmp_path)), "parts", manifest).duplicates is None
    cache_run(manifest, "20260101")
    assert found_in(manifest).groups == 4


def test_whether_images_cross_splits_is_not_known_where_one_split_was_read(tmp_path: Path) -> None:
    manifest = leaky_rows(tmp_path)
    cache_run(manifest, "20260101", TEST)
    found = found_in(manifest)
    assert (found.splits, found.groups, found.across_splits) == (TEST, 0, None)
    rows = shown(manifest)
    assert rows["splits that were read"] == "test"
    assert rows["groups that cross splits"].startswith("not known")


def test_a_sample_of_another_split_in_the_same_features_is_not_counted(tmp_path: Path) -> None:
    """As advice adds some rows of `test` to the features that a cache job has of `train`."""
    manifest = leaky_rows(tmp_path)
    cache_run(manifest, "20260101", TRAIN)
    cache_run(manifest, "20260102", TEST, num_rows=1, rows="digest of one row")
    found = found_in(manifest)
    assert (found.splits, found.unread_splits) == (TRAIN, TEST)
    assert (found.groups, found.samples, found.across_splits) == (0, 0, None)


def test_groups_across_some_splits_are_the_least_while_another_is_unread(tmp_path: Path) -> None:
    counts = {Split.TRAIN: (4, 4), Split.VAL: (1, 1), Split.TEST: (2, 2)}
    manifest = frozen_rows(tmp_path, counts, ("good", "defect"))
    cache_run(manifest, "20260101", [*TRAIN, *TEST])
    assert found_in(manifest).across_splits == 4
    assert shown(manifest)["groups that cross splits"] == "at least 4: no cache job has also read val"


def test_splits_that_were_read_one_after_the_other_are_compared(tmp_path: Path) -> None:
    manifest = leaky_rows(tmp_path)
    cache_run(manifest, "20260101", TEST)
    cache_run(manifest, "20260102", TRAIN)
    found = found_in(manifest)
    assert (found.splits, found.groups, found.across_splits) == ([*TRAIN, *TEST], 4, 4)
    assert shown(manifest)["groups that cross splits"] == "4"


def test_features_of_all_splits_go_before_newer_ones_of_some(tmp_path: Path) -> None:
    manifest = leaky_rows(tmp_path)
    cache_run(manifest, "20260101", set_id="a" * 32)
    cache_run(manifest, "20260102", TEST, set_id="b" * 32)
    assert found_in(manifest).across_splits == 4


@pytest.mark.parametrize("newest", [TRAIN, TEST])
def test_of_features_of_some_splits_the_newest_count(tmp_path: Path, newest: list[Split]) -> None:
    manifest = leaky_rows(tmp_path)
    cache_run(manifest, "20260101", TEST if newest == TRAIN else TRAIN, set_id="f" * 32)
    cache_run(manifest, "20260102", newest, set_id="0" * 32)
    assert found_in(manifest).splits == newest


@pytest.mark.parametrize(("unlabelled", "across"), [((Split.VAL,), 0), ((), None)])
def test_a_split_without_labels_need_not_be_read(
    tmp_path: Path, unlabelled: tuple[Split, ...], across: int | None
) -> None:
    counts = {Split.TRAIN: (4, 0), Split.VAL: (1, 1), Split.TEST: (0, 2)}
    manifest = frozen_rows(tmp_path, counts, ("good", "defect"), unlabelled=unlabelled)
    cache_run(manifest, "20260101", [Split.TRAIN, Split.TEST])
    assert found_in(manifest).across_splits == across


@pytest.mark.parametrize("most", [2, 4096])
def test_of_names_that_end_in_their_number_few_suffixes_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(report_data_card, "_MAX_COUNTED_SUFFIXES", most)
    names = ["a.jpg", *(f"b.{number:03d}" for number in range(30)), "c.jpg"]
    manifest = write_samples(LocalStore(str(tmp_path)), made_manifest(names), ("a", "b", "c"))
    suffixes = read_data_card(manifest.store, "parts", manifest).suffixes
    named = 8 if most == 4096 else 1
    assert list(suffixes) == [".jpg", *(f".{number:03d}" for number in range(named - 1)), "others"]
    assert (suffixes[".jpg"], suffixes["others"]) == (2, 32 - 2 - (named - 1))


def test_the_labelled_split_alone_says_nothing_of_the_others(tmp_path: Path) -> None:
    manifest = leaky_rows(tmp_path, unlabelled=(Split.TEST,))
    cache_run(manifest, "20260101", TRAIN)
    assert found_in(manifest).across_splits is None
