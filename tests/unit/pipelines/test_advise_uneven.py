"""Advice on uneven classes: whatever is expected is the top-1 on images as they come, not on as many of each class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from convoy.core.config import load_config
from convoy.core.errors import ConfigError
from convoy.core.learning_curve import CurveSample, fit_curve
from convoy.core.progress import Silent
from convoy.core.records import Split
from convoy.pipelines.advise_config import AdviseConfig
from convoy.pipelines.advise_evidence import Gatherer
from convoy.pipelines.advise_probes import LabelledFeatures, Prober
from convoy.pipelines.advise_rows import LookRows, choose_look_rows
from convoy.pipelines.advise_rule import expected_probe
from convoy.pipelines.natural_sample import natural_counts
from convoy.pipelines.training_rows import RowLimit, first_of_class, read_split
from convoy.storage import manifests
from convoy.storage.local_store import LocalStore
from convoy.storage.manifests import Manifest
from convoy.vision.head_fitting import evaluate_head, fit_head
from convoy.vision.heads import TensorFeatures
from made_advice_rows import frozen_rows

CLASSES = ("good", "scratch", "dent")
COUNTS = {Split.TRAIN: (1800, 120, 80), Split.VAL: (900, 60, 40)}
CENTRES = 0.55 * np.random.default_rng(0).normal(size=(3, 16))
LAW = [(20.25, 0.6), (40.5, 0.7), (81.0, 0.77), (162.0, 0.83)]


def config(*settings: str) -> AdviseConfig:
    base = ["candidates=[{backbone: {arch: resnet18}}]", "dataset=parts"]
    return load_config(
        AdviseConfig, None, [*base, "look={images_per_class: 60, judged_per_class: 60}", *settings]
    )


def drawn(labels_N: np.ndarray, seed: int) -> np.ndarray:
    """Features of images: classes overlap."""
    noise_ND = np.random.default_rng(seed).normal(size=(len(labels_N), 16))
    return (CENTRES[labels_N] + noise_ND).astype(np.float32)


def source(labels_N: np.ndarray, seed: int) -> TensorFeatures:
    return TensorFeatures(torch.from_numpy(drawn(labels_N, seed)), torch.from_numpy(labels_N))


def features_of(rows: LookRows, seed: int) -> LabelledFeatures:
    train, judged = rows.learnt_by_weight, rows.judged_by_weight
    return LabelledFeatures(
        train_ND=drawn(train.labels_N, seed),
        train_labels_N=train.labels_N,
        train_weights_N=train.weights_N,
        judged_MD=drawn(judged.labels_N, seed + 1),
        judged_labels_M=judged.labels_N,
        judged_weights_M=judged.weights_N,
        places_M=np.arange(len(judged.labels_N)),
    )


def prober_of(folder: Path, manifest: Manifest, settings: AdviseConfig) -> Prober:
    return Prober(LocalStore(str(folder)), manifest, settings, Silent())


def by_class(labels_N: np.ndarray) -> list[int]:
    return np.bincount(labels_N, minlength=3).tolist()


@pytest.mark.parametrize("seed", [1, 3, 5])
def test_what_is_expected_holds_what_a_training_reaches_on_images_as_they_come(
    tmp_path: Path, seed: int
) -> None:
    settings = config("look={images_per_class: 200, judged_per_class: 200}")
    prober = prober_of(tmp_path, frozen_rows(tmp_path, COUNTS, CLASSES), settings)
    expected = expected_probe(prober.judge(features_of(prober.rows, seed)).judged("pooled"))
    train, val, test = (
        source(np.repeat(np.arange(3), counts), seed + 10 + place)
        for place, counts in enumerate((*COUNTS.values(), (9000, 600, 400)))
    )
    trained = fit_head(settings.head, train, val, num_classes=3)
    truth = evaluate_head(trained.head, test).summary().top1
    assert expected.low < truth < expected.high


def test_classes_are_looked_at_by_their_shares(tmp_path: Path) -> None:
    rows = choose_look_rows(frozen_rows(tmp_path, COUNTS | {Split.TEST: (450, 30, 20)}, CLASSES), config())
    assert [by_class(one["label"].to_numpy()) for one in (rows.train, rows.judged, rows.held_out)] == [
        [162, 11, 7]
    ] * 3
    assert rows.chance_top1 == pytest.approx(0.9)


def test_the_seed_of_the_look_draws_other_images_of_the_same_training(tmp_path: Path) -> None:
    manifest = frozen_rows(tmp_path, COUNTS, CLASSES)
    first, again, other = (
        choose_look_rows(manifest, config("look={images_per_class: 10}", f"look.seed={seed}"))
        for seed in (0, 0, 1)
    )
    ids, same, others = (set(rows.train["sample_id"].to_pylist()) for rows in (first, again, other))
    assert ids == same != others
    assert len(ids) == len(others)


@pytest.mark.parametrize("limit", [None, 300])
def test_the_rows_of_a_look_are_those_of_the_whole_splits_without_holding_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int | None
) -> None:
    """Of a dataset of 10^7 images nobody has the memory for all rows."""
    monkeypatch.setattr(manifests, "ROWS_PER_GROUP", 100)
    counts = COUNTS | {Split.TEST: (450, 30, 20)}
    manifest, seed = frozen_rows(tmp_path, counts, CLASSES), 3
    limits = {Split.TRAIN: RowLimit(max_per_class=limit, seed=5)}
    expected = []
    for split, least in ((Split.TRAIN, 4), (Split.VAL, 1), (Split.TEST, 0)):
        all_rows = read_split(manifest, split, limits.get(split))
        counts_K = np.bincount(all_rows["label"].to_numpy(), minlength=3)
        expected.append(first_of_class(all_rows, natural_counts(counts_K, 180, least=least), seed=seed))
    monkeypatch.setattr(Manifest, "read_table", lambda *_, **__: pytest.fail("read the whole split"))
    rows = choose_look_rows(
        manifest, config(f"rows={limits[Split.TRAIN].model_dump_json()}", f"look.seed={seed}")
    )
    assert [rows.train, rows.judged, rows.held_out] == expected


def test_a_rare_class_is_learnt_and_judged_and_counts_as_little_as_it_is(tmp_path: Path) -> None:
    counts = {Split.TRAIN: (1990, 8, 2), Split.VAL: (995, 4, 1)}
    rows = choose_look_rows(frozen_rows(tmp_path, counts, CLASSES), config("look={images_per_class: 10}"))
    assert by_class(rows.train["label"].to_numpy()) == [24, 4, 2]
    assert min(by_class(rows.judged["label"].to_numpy())) == 1
    for weighted in (rows.learnt_by_weight, rows.judged_by_weight):
        shares_K = np.bincount(weighted.labels_N, weighted.weights_N) / weighted.weights_N.sum()
        assert shares_K == pytest.approx([0.995, 0.004, 0.001])
    assert rows.chance_top1 == pytest.approx(0.995)


@pytest.mark.parametrize(("has_test", "share"), [(True, 0.9), (False, 1 / 3)])
def test_a_fold_of_fewer_images_judges_as_the_rows_that_measure_a_training(
    tmp_path: Path, has_test: bool, share: float
) -> None:
    """Of a fold of fewer images where there is nothing else, as even as these are."""
    counts = {Split.TRAIN: COUNTS[Split.TRAIN]} | ({Split.TEST: (90, 6, 4)} if has_test else {})
    rows = choose_look_rows(frozen_rows(tmp_path, counts, CLASSES), config("rows={max_per_class: 50}"))
    assert by_class(rows.train["label"].to_numpy()) == [40, 40, 40]
    assert by_class(rows.judged["label"].to_numpy()) == [10, 10, 10]
    judged = rows.judged_by_weight
    assert judged.weights_N[judged.labels_N == 0].sum() == pytest.approx(30 * share)


def test_a_training_on_as_many_of_each_class_does_not_know_which_is_frequent(tmp_path: Path) -> None:
    rows = choose_look_rows(frozen_rows(tmp_path, COUNTS, CLASSES), config("rows={max_per_class: 50}"))
    assert by_class(rows.judged["label"].to_numpy()) == [162, 11, 7]
    assert rows.chance_top1 == pytest.approx(1 / 3)


def test_a_curve_goes_on_to_as_many_times_the_images_of_its_last_point_as_there_are(tmp_path: Path) -> None:
    """The median class has fewer images than the largest has among those that are looked at."""
    manifest, settings = frozen_rows(tmp_path, COUNTS, CLASSES), config()
    prober = prober_of(tmp_path, manifest, settings)
    gatherer = Gatherer(LocalStore(str(tmp_path)), manifest, settings, prober)
    right_N = np.arange(400)
    curve = fit_curve([CurveSample(size, (right_N < 400 * top1)[None]) for size, top1 in LAW])
    assert gatherer.images_per_class() == 120
    assert gatherer._shrink(curve).factor == pytest.approx(curve.law.fall(162, 1800))


@pytest.mark.parametrize(("has_test", "times"), [(True, 1.25), (False, 1.0)])
def test_a_training_that_is_measured_on_a_fold_is_promised_what_probes_on_the_same_images_reached(
    tmp_path: Path, has_test: bool, times: float
) -> None:
    """Where `test` measures it, it learns from the images of the fold too, a quarter more."""
    counts = {Split.TRAIN: (200, 100, 50)} | ({Split.TEST: (90, 6, 4)} if has_test else {})
    manifest, settings = frozen_rows(tmp_path, counts, CLASSES), config("look={images_per_class: 1000}")
    gatherer = Gatherer(
        LocalStore(str(tmp_path)), manifest, settings, prober_of(tmp_path, manifest, settings)
    )
    right_N = np.arange(400)
    curve = fit_curve([CurveSample(size, (right_N < 400 * top1)[None]) for size, top1 in LAW])
    assert gatherer.images_per_class() == pytest.approx(80 * times)
    assert gatherer._shrink(curve).factor == curve.law.fall(162, 162 * times)


@pytest.mark.parametrize("most", [1200, 2000, 4001])
def test_all_that_is_looked_at_are_max_rows_at_most(tmp_path: Path, most: int) -> None:
    counts = {Split.TRAIN: (30,) * 100, Split.VAL: (8,) * 100, Split.TEST: (8,) * 100}
    manifest = frozen_rows(tmp_path, counts, tuple(f"c{label:02}" for label in range(100)))
    rows = choose_look_rows(manifest, config(f"look={{max_rows: {most}}}"))
    assert most - 3 < rows.all.num_rows <= most
    assert np.bincount(rows.train["label"].to_numpy()).min() >= 4


def test_a_look_that_cannot_hold_a_few_of_each_class_is_refused_and_the_least_is_named(
    tmp_path: Path,
) -> None:
    counts = {Split.TRAIN: (30,) * 100, Split.VAL: (10,) * 100, Split.TEST: (10,) * 100}
    manifest = frozen_rows(tmp_path, counts, tuple(f"c{label:02}" for label in range(100)))
    few, enough = (
        config(f"look={{images_per_class: 20, judged_per_class: 10, max_rows: {most}}}")
        for most in (799, 800)
    )
    with pytest.raises(ConfigError, match="799 images cannot hold 4 of each of 100 classes") as info:
        choose_look_rows(manifest, few)
    assert "look.max_rows to 800" in str(info.value)
    assert choose_look_rows(manifest, enough).all.num_rows == 800
