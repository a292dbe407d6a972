"""k-fold training on a real Ray: models of folds, and honest predictions of every training row."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cache_jobs import cached_features, write_digits
from convoy.core.config import parse_config
from convoy.core.crop_policies import Averaging, CropPlan, CropPolicy
from convoy.core.progress import Silent
from convoy.core.records import Split
from convoy.core.splits import SplitOptions
from convoy.pipelines.folds import FoldModel, OutOfFold, out_of_fold, train_folds
from convoy.pipelines.train_config import TrainConfig
from convoy.pipelines.training_rows import RowLimit, fold_rows, read_split
from convoy.storage.datasets import freeze_dataset, open_dataset
from convoy.storage.manifests import Manifest
from convoy.storage.runs import RunFolder
from convoy.storage.stores import open_store
from convoy.vision.ensembling import mean_of_views

pytestmark = pytest.mark.integration

NUM_ROWS = 240
COUNT = 3


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, ray_cluster: Mapping[str, str]) -> str:
    """Digits in the split train only, one of them damaged."""
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder / "images" / "train", NUM_ROWS)
    (folder / "images" / "train" / "0" / "damaged.jpg").write_bytes(b"\xff\xd8\xff\xe0 not much of an image")
    workspace = str(folder / "workspace")
    whole = SplitOptions(val_fraction=0, test_fraction=0)
    freeze_dataset(open_store(workspace), "digits", str(folder / "images"), splits=whole)
    return workspace


def probe(workspace: str, **settings: Any) -> TrainConfig:
    return parse_config(
        TrainConfig,
        {
            "workspace": workspace,
            "name": "probe",
            "dataset": "digits",
            "backbone": {"arch": "lenet5", "weights": "random", "preset": {"resize_px": None, "crop_px": 32}},
            "tap": "f6",
            "head": {"C": [0.01]},
            "extraction": {"precision": "fp32", "dtype": "float32"},
            **settings,
        },
        where="test",
    )


def trained(config: TrainConfig) -> list[FoldModel]:
    return train_folds(config, COUNT, progress=Silent(), draw_curves=lambda history: b"")


def predicted(config: TrainConfig, models: list[FoldModel], policy: CropPolicy) -> OutOfFold:
    store, manifest = opened(config)
    return out_of_fold(
        store,
        manifest,
        models,
        config,
        plan=CropPlan(policy=policy),
        progress=Silent(),
    )


def opened(config: TrainConfig) -> tuple[Any, Manifest]:
    store = open_store(config.workspace or "")
    return store, open_dataset(store, config.dataset)


@pytest.fixture(scope="module")
def models(workspace: str) -> list[FoldModel]:
    return trained(probe(workspace))


def test_every_training_row_is_predicted_once_by_a_model_that_did_not_see_it(
    workspace: str, models: list[FoldModel]
) -> None:
    config = probe(workspace)
    assert [model.fold.index for model in models] == [0, 1, 2]
    assert len({model.bundle for model in models}) == COUNT
    found = predicted(config, models, CropPolicy.CENTER)
    _, manifest = opened(config)
    rows = read_split(manifest, Split.TRAIN)
    assert found.rejected == ("train/0/damaged.jpg",)
    assert list(found.logits.sample_ids) == [
        name for name in rows["sample_id"].to_pylist() if name not in found.rejected
    ]
    assert found.logits.logits_MVNK.shape == (1, 1, NUM_ROWS, 10)
    assert [name.split("/")[1] for name in found.logits.sample_ids] == [
        str(label) for label in found.logits.labels_N
    ]
    logits_NK = mean_of_views(found.logits.logits_MVNK[0], Averaging.PROBABILITIES)
    top1 = float((logits_NK.argmax(axis=1) == found.logits.labels_N).mean())
    assert top1 == pytest.approx(np.mean([model.top1 for model in models]), abs=0.01)
    # What scikit-learn's cross-validation over the same folds says of the same features.
    store = open_store(workspace)
    (set_id,) = store.list_folders("features/")
    features = cached_features(workspace, set_id)
    peer = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=5000))
    features_ND = np.stack([features[name] for name in found.logits.sample_ids])
    fold_of = {
        name: model.fold.index
        for model in models
        for name in fold_rows(manifest, RowLimit(fold=model.fold))["sample_id"].to_pylist()
    }
    same_folds = PredefinedSplit([fold_of[name] for name in found.logits.sample_ids])
    peers_N = cross_val_predict(peer, features_ND, found.logits.labels_N, cv=same_folds)
    assert 0.8 < top1 < 1
    assert float((peers_N == logits_NK.argmax(axis=1)).mean()) > 0.985


def test_folds_that_are_known_are_neither_trained_nor_predicted_again(
    workspace: str, models: list[FoldModel]
) -> None:
    config = probe(workspace)
    first = predicted(config, models, CropPolicy.FLIP)
    runs = {path.name for path in Path(workspace, "runs").iterdir()}
    assert trained(config) == models
    again = predicted(config, models, CropPolicy.FLIP)
    assert again.runs == first.runs
    assert again.logits.logits_MVNK.shape[1] == 2
    np.testing.assert_array_equal(again.logits.logits_MVNK, first.logits.logits_MVNK)
    assert {path.name for path in Path(workspace, "runs").iterdir()} == runs
    # A fold whose model has gone is trained again, to the same bits, and no other.
    name, _, digest = models[1].bundle.partition("@")
    shutil.rmtree(Path(workspace, "models", name, digest))
    assert trained(config) == models
    assert len(list(Path(workspace, "runs").iterdir())) == len(runs) + 1


@pytest.mark.slow
def test_a_network_is_watched_by_the_fold_that_it_leaves_out(workspace: str) -> None:
    settings = {
        "name": "network",
        "strategy": "from_scratch",
        "tap": None,
        "epochs": 1,
        "learning_rate": 0.02,
        "recipe": {"batch_size": 16, "precision": "fp32"},
        "workers": {"cpus_per_worker": 1},
    }
    config = probe(workspace, **settings)
    models = trained(config)
    found = predicted(config, models, CropPolicy.CENTER)
    assert found.logits.logits_MVNK.shape == (1, 1, NUM_ROWS, 10)
    store = open_store(workspace)
    seen: set[str] = set()
    for path in Path(workspace, "runs").glob("*/trained.json"):
        folder = RunFolder(store, path.parent.name)
        train, val = (
            set(store.open_parquet(folder.key(f"input/{name}.parquet")).read()["sample_id"].to_pylist())
            for name in ("train", "val")
        )
        assert train.isdisjoint(val)
        assert len(train | val) == NUM_ROWS + 1
        assert seen.isdisjoint(val)
        seen |= val
        report = json.loads(Path(workspace, "runs", folder.run_id, "report.json").read_text())
        assert report["samples"] == len(val)
        assert report["splits"] == ["train"]
    assert len(seen) == NUM_ROWS + 1
