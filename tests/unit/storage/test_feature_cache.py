from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pytest

from convoy.storage.commits import publish, read_records
from convoy.storage.feature_cache import FeatureCache, FeatureSetSpec, contains
from convoy.storage.feature_reading import iter_wanted
from convoy.storage.local_store import LocalStore
from convoy.storage.runs import RunFolder
from made_runs import SET_ID, content_id, feature_of, finish_slice, new_run

NAMES = [f"s{index:02d}" for index in range(10)]


def committed(store: LocalStore, names: list[str], run_id: str, rejected: list[str] | None = None) -> None:
    run = new_run(store, names, run_id=run_id)
    for name in run.slice_names():
        finish_slice(store, run, name, rejected=rejected or [])
    folder = RunFolder(store, run_id)
    publish(folder, run, read_records(folder))


def ids(names: list[str]) -> np.ndarray:
    return np.array([content_id(name) for name in names], "S16")


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path))


def test_known_content_is_what_finished_runs_committed(store: LocalStore) -> None:
    committed(store, NAMES[:6], "r1", rejected=["s02"])
    new_run(store, NAMES[6:], run_id="unfinished")
    known = FeatureCache(store).known_content(SET_ID)
    assert contains(known.cached, ids(NAMES)).tolist() == [
        name in NAMES[:6] and name != "s02" for name in NAMES
    ]
    assert contains(known.rejected, ids(NAMES)).tolist() == [name == "s02" for name in NAMES]


def test_features_come_back_aligned_with_the_rows_that_want_them(store: LocalStore) -> None:
    committed(store, NAMES[:7], "r1")
    committed(store, NAMES[5:9], "r2")
    wanted = ["s08", "s00", "s05", "s00", "s09", "s06"]
    found: dict[int, np.ndarray] = {}
    for chunk in iter_wanted(FeatureCache(store), SET_ID, ids(wanted)):
        for row, features in zip(chunk.rows_B.tolist(), chunk.features_BD, strict=True):
            assert row not in found
            found[row] = features
    assert sorted(found) == [0, 1, 2, 3, 5]
    for row, features in found.items():
        np.testing.assert_array_equal(features, feature_of(wanted[row]))


def test_parts_without_a_wanted_row_are_left_out(store: LocalStore) -> None:
    committed(store, NAMES[:4], "r1")
    committed(store, NAMES[4:8], "r2")
    cache = FeatureCache(store)
    for wanted, num_rows in ((NAMES[:2], [4]), (NAMES[3:5], [4, 4]), (NAMES[9:], [])):
        for index in (None, cache.part_index(SET_ID)):
            tables = cache.iter_parts(SET_ID, ["sample_id"], having=np.sort(ids(wanted)), index=index)
            assert [table.num_rows for table in tables] == num_rows


def test_with_an_index_no_part_is_opened_that_has_nothing_wanted(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    committed(store, NAMES[:4], "r1")
    committed(store, NAMES[4:8], "r2")
    cache = FeatureCache(store)
    index = cache.part_index(SET_ID)
    opened: list[str] = []
    open_parquet = LocalStore.open_parquet

    def watched(of_store: LocalStore, key: str) -> Any:
        opened.append(key)
        return open_parquet(of_store, key)

    monkeypatch.setattr(LocalStore, "open_parquet", watched)
    chunks = list(iter_wanted(cache, SET_ID, ids(NAMES[5:7]), index=index))
    assert [len(chunk.rows_B) for chunk in chunks] == [2]
    assert [key for key in opened if "run=r1" in key] == []
    assert len(opened) == 1


def test_features_are_vectors_for_duckdb_polars_and_pandas(store: LocalStore, tmp_path: Path) -> None:
    committed(store, NAMES, "r1")
    pattern = f"{tmp_path}/features/{SET_ID}/run=*/*.parquet"
    rows = duckdb.sql(f"select sample_id, features, run from '{pattern}' order by sample_id").fetchall()
    assert [row[0] for row in rows] == NAMES
    assert list(rows[3][1]) == feature_of("s03").tolist()
    assert rows[0][2] == "r1"
    by_polars = pl.read_parquet(pattern).sort("sample_id")
    assert by_polars["features"].to_list()[3] == feature_of("s03").tolist()
    (path, *_) = sorted((tmp_path / "features" / SET_ID / "run=r1").iterdir())
    np.testing.assert_array_equal(pd.read_parquet(path)["features"][3], feature_of("s03"))


def test_everything_that_determines_features_changes_the_set() -> None:
    spec = FeatureSetSpec(
        decode_rule={"v": 1},
        view=0,
        view_recipe={"kind": "eval"},
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        arch="a",
        weights_digest="d",
        tap="t",
        precision="fp32",
        dtype="float32",
    )
    changes = {
        "format_version": 2,
        "decode_rule": {"v": 2},
        "view": 1,
        "view_recipe": {"kind": "crop"},
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "arch": "b",
        "weights_digest": "e",
        "code_digest": "c",
        "axis_version": 2,
        "tap": "u",
        "precision": "bf16",
        "dtype": "float16",
    }
    assert set(changes) == set(FeatureSetSpec.model_fields)
    ids_seen = {spec.set_id} | {spec.model_copy(update={key: value}).set_id for key, value in changes.items()}
    assert len(ids_seen) == len(changes) + 1
