from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from convoy.core.errors import DataError
from convoy.core.fingerprints import canonical_json
from convoy.core.records import Split
from convoy.pipelines.feature_source import (
    LabelledRows,
    StreamedFeatures,
    count_rejects,
    gather_features,
    open_features,
)
from convoy.pipelines.training_rows import read_split
from convoy.storage.commits import SetCommit, feature_prefix, part_key, publish, read_records
from convoy.storage.feature_cache import FeatureCache
from convoy.storage.local_store import LocalStore
from convoy.storage.manifests import (
    MANIFEST_SCHEMA,
)
from convoy.storage.parts import FeatureRows, write_features
from convoy.storage.runs import RunFolder
from convoy.vision.head_config import HeadConfig, HeadKind, MlpConfig
from convoy.vision.head_fitting import fit_head
from convoy.vision.heads import FeatureSource, TensorFeatures
from made_manifests import write_samples
from made_runs import SET_ID, content_id, feature_of, finish_slice, made_manifest, new_run

NAMES = [f"s{index:02d}" for index in range(10)]
OTHER_VIEW = "e" * 32
IN_MEMORY, STREAMED = 2**30, 0
ROW_BYTES = 4 * 4  # four float32 features

Row = tuple[tuple[float, ...], int, float]


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path))


def commit_names(
    store: LocalStore, names: Sequence[str], *, run_id: str = "r1", rejected: Sequence[str] = ()
) -> None:
    """A whole run of slices of four, with its rejects."""
    run = new_run(store, names, run_id=run_id)
    for name in run.slice_names():
        finish_slice(store, run, name, rejected=rejected)
    publish(RunFolder(store, run_id), run, read_records(RunFolder(store, run_id)))


def commit_rows(
    store: LocalStore, set_id: str, contents: Sequence[bytes], features_BD: np.ndarray, *, run_id: str = "r1"
) -> None:
    """One part with any content and features, as a finished run leaves it."""
    rows = FeatureRows(
        sample_ids=[str(index) for index in range(len(contents))],
        content_ids=contents,
        content_digests=contents,
        view=0,
        features_BD=features_BD,
    )
    key = part_key(feature_prefix(set_id, run_id), "0-000000", "a0")
    commit = SetCommit(
        run_id=run_id, committed_unix_s=0.0, parts=(write_features(store, key, rows, {}),), rejects=()
    )
    store.put(f"features/{set_id}/commits/{run_id}.json", canonical_json(commit))


def samples_of(names: Sequence[str], **columns: Sequence[Any]) -> pa.Table:
    """A made manifest, with some columns replaced and weights that tell the rows apart."""
    samples = made_manifest(names)
    for name, values in {"weight": [1.0 + index for index in range(len(names))], **columns}.items():
        field = MANIFEST_SCHEMA.field(name)
        samples = samples.set_column(MANIFEST_SCHEMA.names.index(name), field, pa.array(values, field.type))
    return samples


def labelled(store: LocalStore, samples: pa.Table, splits: Sequence[Split] = (Split.TRAIN,)) -> LabelledRows:
    manifest = write_samples(store, samples, ("a", "b", "c"))
    return LabelledRows.of(pa.concat_tables([read_split(manifest, split) for split in splits]))


def opened(
    store: LocalStore, rows: LabelledRows, limit_bytes: int, set_ids: Sequence[str] = (SET_ID,)
) -> FeatureSource:
    return open_features(FeatureCache(store), set_ids, rows, memory_limit_bytes=limit_bytes)


def rows_in_order(source: FeatureSource) -> list[Row]:
    return [
        (tuple(features), label, weight)
        for batch in source
        for features, label, weight in zip(
            batch.features_BD.tolist(), batch.labels_B.tolist(), batch.weights_B.tolist(), strict=True
        )
    ]


def row_of(name: str, *, shift: float = 0.0) -> Row:
    """What `samples_of(NAMES)` and a cache of made features say of a sample."""
    index = NAMES.index(name)
    return tuple((feature_of(name) + shift).tolist()), index % 3, 1.0 + index


both_sources = pytest.mark.parametrize("limit_bytes", [IN_MEMORY, STREAMED], ids=["in_memory", "streamed"])


@both_sources
def test_every_labelled_sample_comes_once_with_its_own_label_and_weight(
    store: LocalStore, limit_bytes: int
) -> None:
    commit_names(store, [*NAMES, "of another dataset"])
    source = opened(store, labelled(store, samples_of(NAMES)), limit_bytes)
    assert sorted(rows_in_order(source)) == sorted(row_of(name) for name in NAMES)


@both_sources
def test_each_view_adds_rows_of_its_own(store: LocalStore, limit_bytes: int) -> None:
    commit_names(store, NAMES)
    shifted_ND = np.stack([feature_of(name) + 1000 for name in NAMES])
    commit_rows(store, OTHER_VIEW, [content_id(name) for name in NAMES], shifted_ND)
    source = opened(store, labelled(store, samples_of(NAMES)), limit_bytes, [SET_ID, OTHER_VIEW])
    expected = [row_of(name, shift=shift) for name in NAMES for shift in (0, 1000)]
    assert sorted(rows_in_order(source)) == sorted(expected)


@both_sources
def test_rejected_samples_do_not_come(store: LocalStore, limit_bytes: int) -> None:
    commit_names(store, NAMES, rejected=["s00", "s07"])
    source = opened(store, labelled(store, samples_of(NAMES)), limit_bytes)
    usable = [name for name in NAMES if name not in {"s00", "s07"}]
    assert sorted(rows_in_order(source)) == sorted(row_of(name) for name in usable)


@both_sources
def test_unlabelled_samples_are_left_out(store: LocalStore, limit_bytes: int) -> None:
    commit_names(store, NAMES)
    labels = [None if index in {1, 9} else index % 3 for index in range(len(NAMES))]
    source = opened(store, labelled(store, samples_of(NAMES, label=labels)), limit_bytes)
    kept = [name for name in NAMES if name not in {"s01", "s09"}]
    assert sorted(rows_in_order(source)) == sorted(row_of(name) for name in kept)


@both_sources
def test_only_samples_of_the_wanted_splits_come(store: LocalStore, limit_bytes: int) -> None:
    commit_names(store, NAMES)
    splits = [*["train"] * 5, *["val"] * 3, *["test"] * 2]
    rows = labelled(store, samples_of(NAMES, split=splits), [Split.VAL, Split.TEST])
    assert sorted(rows_in_order(opened(store, rows, limit_bytes))) == sorted(map(row_of, NAMES[5:]))


@both_sources
def test_the_promised_number_of_rows_comes_in_every_pass(store: LocalStore, limit_bytes: int) -> None:
    # Content that two runs computed, content that two samples share, and rejects, in two unlike views.
    commit_names(store, NAMES[:7], run_id="r1", rejected=["s01"])
    commit_names(store, NAMES[5:], run_id="r2", rejected=["s08"])
    commit_rows(store, OTHER_VIEW, [content_id("s03")], feature_of("s03")[None])
    contents = [content_id("s03" if name == "s04" else name) for name in NAMES]
    rows = labelled(store, samples_of(NAMES, content_id=contents))
    source = opened(store, rows, limit_bytes, [SET_ID, OTHER_VIEW])
    first, second = rows_in_order(source), rows_in_order(source)
    assert source.num_rows == len(first) == 8 + 2
    assert first == second
    assert all(len(features) == source.num_features == 4 for features, _, _ in first)


@both_sources
def test_content_ids_may_end_in_zero_bytes(store: LocalStore, limit_bytes: int) -> None:
    contents = [bytes(16), b"\1" + bytes(15), bytes(15) + b"\1"]
    commit_rows(store, SET_ID, contents, np.eye(3, 4, dtype=np.float32))
    source = opened(store, labelled(store, samples_of(NAMES[:3], content_id=contents)), limit_bytes)
    found = {weight: features for features, _, weight in rows_in_order(source)}
    assert found == {1.0: (1, 0, 0, 0), 2.0: (0, 1, 0, 0), 3.0: (0, 0, 1, 0)}
    assert source.num_rows == 3


@both_sources
def test_float16_in_the_cache_is_float32_in_a_fit(store: LocalStore, limit_bytes: int) -> None:
    halves_ND = np.array([[0.1, 2.5, -7.0, 60000.0]], np.float16)
    commit_rows(store, SET_ID, [content_id("s00")], halves_ND)
    (batch,) = opened(store, labelled(store, samples_of(["s00"])), limit_bytes)
    assert (batch.features_BD.dtype, batch.labels_B.dtype) == (torch.float32, torch.int64)
    np.testing.assert_array_equal(batch.features_BD.numpy(), halves_ND.astype(np.float32))


def test_in_memory_rows_are_in_manifest_order_view_by_view_whatever_the_order_of_the_cache(
    store: LocalStore,
) -> None:
    commit_names(store, NAMES[4:], run_id="r1")
    commit_names(store, NAMES[:4], run_id="r2")
    shifted_ND = np.stack([feature_of(name) + 1000 for name in reversed(NAMES)])
    commit_rows(store, OTHER_VIEW, [content_id(name) for name in reversed(NAMES)], shifted_ND)
    source = opened(store, labelled(store, samples_of(NAMES)), IN_MEMORY, [SET_ID, OTHER_VIEW])
    assert rows_in_order(source) == [row_of(name, shift=shift) for shift in (0, 1000) for name in NAMES]


def test_features_are_streamed_only_where_all_views_exceed_the_memory_limit(store: LocalStore) -> None:
    commit_names(store, NAMES, rejected=["s02"])
    rows = labelled(store, samples_of(NAMES))
    views = [SET_ID, SET_ID]
    needed_bytes = 2 * (len(NAMES) - 1) * ROW_BYTES
    assert isinstance(opened(store, rows, needed_bytes, views), TensorFeatures)
    assert isinstance(opened(store, rows, needed_bytes - 1, views), StreamedFeatures)


def test_a_streamed_fit_equals_the_one_in_memory(store: LocalStore) -> None:
    names = [f"s{index:03d}" for index in range(90)]
    commit_names(store, names, rejected=["s013"])
    rows = labelled(store, samples_of(names))
    heads = [
        fit_head(HeadConfig(C=(0.01,)), opened(store, rows, limit_bytes), None, num_classes=3).head
        for limit_bytes in (IN_MEMORY, STREAMED)
    ]
    features_ND = torch.from_numpy(np.stack([feature_of(name) for name in names]))
    with torch.inference_mode():
        in_memory_NK, streamed_NK = (torch.softmax(head(features_ND), dim=1) for head in heads)
    assert in_memory_NK.std(dim=0).min() > 0.01
    torch.testing.assert_close(streamed_NK, in_memory_NK, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [HeadKind.SOFTMAX, HeadKind.MLP])
def test_a_fit_whose_rows_lie_on_disk_is_the_same_to_the_last_bit(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, kind: HeadKind
) -> None:
    commit_names(store, NAMES, rejected=["s02"])
    rows = labelled(store, samples_of(NAMES))
    asked: list[int | None] = []

    def fit(free_bytes: int | None) -> torch.Tensor:
        monkeypatch.setattr(
            "convoy.core.large_arrays.free_memory_bytes", lambda: asked.append(free_bytes) or free_bytes
        )
        config = HeadConfig(kind=kind, C=(1.0,), mlp=MlpConfig(epochs=2))
        head = fit_head(config, opened(store, rows, IN_MEMORY), None, num_classes=3).head
        return torch.cat([parameter.flatten() for parameter in head.parameters()])

    assert torch.equal(fit(0), fit(None))
    assert asked == ([0, None] if kind is HeadKind.SOFTMAX else [0, 0, None, None])


def test_gathered_features_stand_at_the_rows_that_asked_for_them(store: LocalStore) -> None:
    commit_names(store, NAMES, rejected=["s04"])
    wanted = ["s09", "s04", "s00", "unknown", "s09"]
    ids_N = np.array([content_id(name) for name in wanted], "S16")
    features_ND, found_N = gather_features(FeatureCache(store), SET_ID, ids_N)
    assert found_N.tolist() == [True, False, True, False, True]
    expected_ND = [
        feature_of(name) if found else np.zeros(4) for name, found in zip(wanted, found_N, strict=True)
    ]
    np.testing.assert_array_equal(features_ND, np.stack(expected_ND))
    assert features_ND.dtype == np.float32


def test_a_split_without_labels_is_refused_by_name(store: LocalStore) -> None:
    with pytest.raises(DataError, match=r"no labelled sample in split val"):
        labelled(store, samples_of(NAMES), [Split.VAL, Split.TEST])
    with pytest.raises(DataError, match=r"no labelled sample in split train"):
        labelled(store, samples_of(NAMES, label=[None] * len(NAMES)))


@both_sources
def test_samples_without_any_feature_are_refused(store: LocalStore, limit_bytes: int) -> None:
    commit_names(store, ["of another dataset", NAMES[0]], rejected=NAMES[:1])
    rows = labelled(store, samples_of(NAMES))
    with pytest.raises(DataError, match="none of 10 images has features: 9 unreadable, 1 corrupt"):
        opened(store, rows, limit_bytes)


def test_images_without_features_are_counted_by_the_code_of_their_reject(store: LocalStore) -> None:
    commit_names(store, ["a", "b", "c", "d"], rejected=["b", "d"])
    cache = FeatureCache(store)
    # Nobody asks for d, and the cache has never seen e.
    assert count_rejects(cache, [SET_ID], made_manifest(["a", "b", "c"])) == {"corrupt": 1}
    assert count_rejects(cache, [SET_ID], made_manifest(["a", "b", "e"])) == {"corrupt": 1, "unreadable": 1}
    assert count_rejects(cache, [SET_ID], made_manifest(["a", "c"])) == {}


def test_an_image_that_one_set_lacks_is_a_reject(store: LocalStore) -> None:
    commit_names(store, ["a", "b", "c"], rejected=["b"])
    commit_rows(store, OTHER_VIEW, [content_id("a"), content_id("b")], np.ones((2, 4), np.float32))
    rows = made_manifest(["a", "b", "c"])
    assert count_rejects(FeatureCache(store), [SET_ID, OTHER_VIEW], rows) == {"corrupt": 1, "unreadable": 1}


def test_an_image_that_was_read_at_last_is_no_reject(store: LocalStore) -> None:
    commit_names(store, ["a", "b", "c"], rejected=["b"])
    commit_names(store, ["b"], run_id="r2")
    assert count_rejects(FeatureCache(store), [SET_ID], made_manifest(["a", "b", "c"])) == {}
