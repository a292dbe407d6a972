"""Probes of advice: subsets grow by adding, heads are judged by rows that did not choose them, taps span the depth."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from convoy.core.config import load_config
from convoy.core.errors import DataError
from convoy.core.fingerprints import canonical_json
from convoy.core.learning_curve import AS_MEASURED
from convoy.core.progress import Silent
from convoy.core.records import Split
from convoy.core.transferability import logme
from convoy.pipelines.advise_config import AdviseConfig
from convoy.pipelines.advise_data import find_warnings
from convoy.pipelines.advise_evidence import Gatherer
from convoy.pipelines.advise_probes import Look, Prober
from convoy.pipelines.advise_rows import choose_look_rows, missing_classes, subset_rows
from convoy.pipelines.advise_taps import spread_taps
from convoy.pipelines.backbone_record import BackboneRecord
from convoy.pipelines.feature_source import LabelledRows, open_features
from convoy.pipelines.feature_summary import FeatureSummary
from convoy.pipelines.judged_heads import JudgedHead, judge_head
from convoy.pipelines.models import fetch_backbone
from convoy.storage.commits import SetCommit, feature_prefix, part_key, publish, read_records
from convoy.storage.feature_cache import FeatureCache
from convoy.storage.local_store import LocalStore
from convoy.storage.manifests import Manifest
from convoy.storage.parts import FeatureRows, write_features
from convoy.storage.runs import RunFolder
from convoy.vision.backbone_config import BackboneConfig
from convoy.vision.backbones import build_network, depth_axis
from convoy.vision.head_config import HeadConfig
from convoy.vision.heads import TensorFeatures
from convoy.vision.presets import EvalPreset
from made_advice import made_advice, made_probes
from made_advice_rows import frozen_rows
from made_runs import SET_ID, finish_slice, new_run

CONFIG = load_config(AdviseConfig, None, ["candidates=[{backbone: {arch: resnet18}}]", "dataset=parts"])
HEAD = HeadConfig(C=(1e-3, 1e-1, 10.0), gradient_tolerance=1e-4)


def test_a_larger_subset_only_adds_rows_and_takes_as_many_of_each_class() -> None:
    labels_N = np.random.default_rng(0).permutation(np.repeat(np.arange(4), 50))
    small, large = (subset_rows(labels_N, size, seed=1, repeat=0) for size in (5, 20))
    assert set(small) < set(large)
    assert np.bincount(labels_N[small]).tolist() == [5, 5, 5, 5]
    assert subset_rows(labels_N, 5, seed=1, repeat=1).tolist() != small.tolist()


def test_subsets_are_as_uneven_as_the_rows_and_hold_each_class() -> None:
    labels_N = np.repeat([0, 1, 2], [80, 20, 2])
    counts = [
        np.bincount(labels_N[subset_rows(labels_N, size, seed=0, repeat=0)]).tolist() for size in (80, 40, 8)
    ]
    assert counts == [[80, 20, 2], [40, 10, 1], [8, 2, 1]]


def test_a_head_on_features_that_tell_the_classes_apart_is_right() -> None:
    random = np.random.default_rng(0)
    labels_N = random.integers(0, 3, 150)
    features_ND = (4 * np.eye(6)[labels_N] + random.normal(size=(150, 6))).astype(np.float32)
    train = TensorFeatures(torch.from_numpy(features_ND[:100]), torch.from_numpy(labels_N[:100]))
    head = judge_head(HEAD, train, features_ND[100:], labels_N[100:], num_classes=3)
    assert head.correct_M.mean() > 0.9
    assert head.C in HEAD.C
    assert head.seconds > 0


def test_no_head_looks_good_on_labels_that_mean_nothing() -> None:
    found = []
    for seed in range(12):
        random = np.random.default_rng(seed)
        labels_N = random.integers(0, 2, 140)
        features_ND = random.normal(size=(140, 20)).astype(np.float32)
        train = TensorFeatures(torch.from_numpy(features_ND[:100]), torch.from_numpy(labels_N[:100]))
        head = judge_head(HEAD, train, features_ND[100:], labels_N[100:], num_classes=2)
        found.append(head.correct_M.mean())
    assert abs(np.mean(found) - 0.5) < 0.06


def test_taps_span_the_depth_and_end_at_the_pooled_features() -> None:
    config = BackboneConfig(
        arch="cifar_resnet20", weights="random", preset=EvalPreset(resize_px=32, crop_px=32)
    )
    axis = depth_axis(config, build_network(config))
    taps = spread_taps(axis, 5)
    indices = [next(stage.index for stage in axis if stage.name == tap) for tap in taps]
    assert taps[-1] == "pooled"
    assert len(taps) == 5
    assert indices == sorted(indices)
    assert indices[0] == 0


def test_a_fold_judges_where_val_has_one_class_only(tmp_path: Path) -> None:
    manifest = frozen_rows(tmp_path, {Split.TRAIN: (100, 10), Split.VAL: (60, 0)}, ("good", "defect"))
    rows = choose_look_rows(manifest, CONFIG)
    assert set(rows.judged["split"].to_pylist()) == {"train"}
    assert set(rows.judged["label"].to_pylist()) == {0, 1}


def test_judges_of_one_class_are_refused_before_any_image_is_looked_at(tmp_path: Path) -> None:
    """Dealt out one after the other, 116 and 4 images leave the first of five folds without a defect."""
    manifest = frozen_rows(tmp_path, {Split.TRAIN: (116, 4)}, ("good", "defect"))
    with pytest.raises(
        DataError, match="all 24 images that judge are of one class, none is of 'defect'"
    ) as info:
        choose_look_rows(manifest, CONFIG)
    assert "val_fraction" in str(info.value)


def test_classes_that_no_image_judges_are_warned_of(tmp_path: Path) -> None:
    classes = ("good", "scratch", "dent")
    manifest = frozen_rows(tmp_path, {Split.TRAIN: (100, 50, 4), Split.VAL: (50, 10, 0)}, classes)
    unjudged = missing_classes(choose_look_rows(manifest, CONFIG).judged, classes)
    assert unjudged == ["dent"]
    warnings = find_warnings(made_advice().size.model_copy(update={"unjudged_classes": unjudged}))
    assert any("no image of 1 of 3 classes judges (dent)" in warning for warning in warnings)


def cached_look(store: LocalStore, manifest: Manifest, features: dict[str, np.ndarray]) -> Look:
    """What a look leaves behind: the features of all rows at the taps, and where they lie."""
    rows = manifest.read_table()
    contents = rows["content_id"].to_pylist()
    sets = {}
    for place, (tap, features_ND) in enumerate(features.items()):
        sets[f"{tap}/0"] = set_id = f"{place:032x}"
        ids = rows["sample_id"].to_pylist()
        part = FeatureRows(
            sample_ids=ids, content_ids=contents, content_digests=contents, view=0, features_BD=features_ND
        )
        written = write_features(store, part_key(feature_prefix(set_id, "r"), "0-000000", "a0"), part, {})
        commit = SetCommit(run_id="r", committed_unix_s=0.0, parts=(written,), rejects=())
        store.put(f"features/{set_id}/commits/r.json", canonical_json(commit))
    config = BackboneConfig(
        arch="cifar_resnet20", weights="random", preset=EvalPreset(resize_px=32, crop_px=32)
    )
    record = BackboneRecord.model_construct(config=config, axis=depth_axis(config, build_network(config)))
    summary = FeatureSummary.model_construct(sets=sets)
    head = JudgedHead(np.ones(0, np.bool_), np.ones(0), np.arange(0), C=1.0, seconds=0.0)
    return Look(record, summary, made_probes("resnet20", 0.0), head, None)


def test_a_picture_in_the_training_rows_and_in_the_judging_fold_is_a_leak(tmp_path: Path) -> None:
    """However large the numbers of the tap that cannot tell it: no tap outweighs another."""
    manifest = frozen_rows(tmp_path, {Split.TRAIN: (120, 120)}, ("good", "defect"))
    store = LocalStore(str(tmp_path))
    prober = Prober(store, manifest, CONFIG, Silent())
    names = manifest.read_table(["sample_id"])["sample_id"].to_pylist()
    judged, learnt = (
        names.index(part["sample_id"][0].as_py()) for part in (prober.rows.judged, prober.rows.train)
    )
    random = np.random.default_rng(0)
    fine_ND = random.normal(size=(240, 100)).astype(np.float32)
    fine_ND[judged] = fine_ND[learnt] + 0.01
    coarse_ND = 1000 * random.normal(size=(240, 500)).astype(np.float32)
    features = {"layer1.2": fine_ND, "layer2.2": fine_ND, "layer3.2": coarse_ND}
    report = prober.near_duplicates(cached_look(store, manifest, features))
    assert (report.compared, report.groups, report.across_splits) == (240, 1, 1)
    assert {one.split for one in report.examples[0].samples} == {"train", "val"}


def test_few_validation_rows_are_looked_at_for_leaks_and_twins_in_training_rows_are_none(
    tmp_path: Path,
) -> None:
    """Too few rows of `val` to judge by: a fold of `train` does, from which trainings learn all the same."""
    manifest = frozen_rows(tmp_path, {Split.TRAIN: (120, 120), Split.VAL: (10, 10)}, ("good", "defect"))
    store = LocalStore(str(tmp_path))
    prober = Prober(store, manifest, CONFIG, Silent())
    names = manifest.read_table(["sample_id"])["sample_id"].to_pylist()
    judged, (first, second) = (
        [names.index(name) for name in part["sample_id"].to_pylist()[:number]]
        for part, number in ((prober.rows.judged, 1), (prober.rows.train, 2))
    )
    features_ND = np.random.default_rng(0).normal(size=(260, 100)).astype(np.float32)
    features_ND[judged] = features_ND[first] + 0.01
    features_ND[names.index("val/0/003")] = features_ND[second] + 0.01
    features = dict.fromkeys(("layer1.2", "layer2.2", "layer3.2"), features_ND)
    report = prober.near_duplicates(cached_look(store, manifest, features))
    assert (report.compared, report.groups, report.across_splits) == (260, 2, 1)
    assert [{one.split for one in group.samples} for group in report.examples] == [
        {"train", "val"},
        {"train"},
    ]


def is_doubted(name: str) -> bool:
    """Three of five training rows."""
    return name.startswith("train/") and int(name[-3:]) % 5 < 3


def doubted_rows(folder: Path, weight: float) -> Manifest:
    """A dataset that does not trust most labels of its training rows."""
    return frozen_rows(
        folder,
        {Split.TRAIN: (100, 100), Split.VAL: (50, 50)},
        ("good", "defect"),
        weigh=lambda name: weight if is_doubted(name) else 1.0,
    )


def mislabelled(manifest: Manifest) -> np.ndarray:
    """Features by which a doubted row is of the other class than it says."""
    rows = manifest.read_table(["sample_id", "label"])
    doubted_N = np.array([is_doubted(name) for name in rows["sample_id"].to_pylist()])
    classes_N = rows["label"].to_numpy() ^ doubted_N
    noise_ND = np.random.default_rng(0).normal(size=(rows.num_rows, 8))
    return (4 * np.eye(8)[classes_N] + noise_ND).astype(np.float32)


@pytest.mark.parametrize("weight", [0.0, 0.01])
def test_probes_and_learning_curve_weigh_the_rows_as_a_training_does(tmp_path: Path, weight: float) -> None:
    manifest = doubted_rows(tmp_path, weight)
    store = LocalStore(str(tmp_path))
    look = cached_look(store, manifest, {"pooled": mislabelled(manifest)})
    prober = Prober(store, manifest, CONFIG, Silent())
    features = prober.features(prober.set_id(look, "pooled"))
    head = prober.judge(features)
    train = LabelledRows.of(prober.rows.train)
    learnt = open_features(FeatureCache(store), [prober.set_id(look, "pooled")], train)
    as_trained = judge_head(CONFIG.head, learnt, features.judged_MD, features.judged_labels_M, num_classes=2)
    assert head.correct_M.tolist() == as_trained.correct_M.tolist()
    assert head.top1.estimate > 0.9
    half = prober.curve(features, head.correct_M)[-2]
    assert half.correct_SN.mean() > 0.9


def test_rows_of_weight_0_are_no_neighbours_no_evidence_and_no_images_to_learn_from(tmp_path: Path) -> None:
    manifest = doubted_rows(tmp_path, 0.0)
    store = LocalStore(str(tmp_path))
    features_ND = mislabelled(manifest)
    look = cached_look(store, manifest, {"stage 2": features_ND})
    prober = Prober(store, manifest, CONFIG, Silent())
    tap = look.record.axis[2].name
    probe, _ = prober._probe(look.record, tap, prober.set_id(look, "stage 2"))
    assert probe.knn_top1 > 0.9
    rows = manifest.read_table()
    trusted_N = np.array(
        [one.startswith("train/") and not is_doubted(one) for one in rows["sample_id"].to_pylist()]
    )
    assert probe.logme == logme(features_ND[trusted_N], rows["label"].to_numpy()[trusted_N])
    assert Gatherer(store, manifest, CONFIG, prober).images_per_class() == 40


def test_a_class_whose_images_all_have_weight_0_is_refused_before_any_image_is_looked_at(
    tmp_path: Path,
) -> None:
    manifest = frozen_rows(
        tmp_path,
        {Split.TRAIN: (100, 100), Split.VAL: (50, 50)},
        ("good", "defect"),
        weigh=lambda name: 0.0 if name.startswith("train/1/") else 1.0,
    )
    with pytest.raises(DataError, match="all images of 'defect' that are learnt from have a weight of 0"):
        choose_look_rows(manifest, CONFIG)


@pytest.mark.parametrize(
    ("unreadable", "message"),
    [
        ("val/", "none of 60 images that judge could be read, of split val: 60 corrupt"),
        ("train/1/", "no image of 'defect' to learn from could be read, of split train: 10 corrupt"),
        (
            "",
            r"no image of 'good' \(2 such classes\) to learn from could be read, of split train: 20 corrupt",
        ),
    ],
)
def test_images_that_cannot_be_read_are_named_by_class_split_and_reason(
    tmp_path: Path, unreadable: str, message: str
) -> None:
    manifest = frozen_rows(tmp_path, {Split.TRAIN: (10, 10), Split.VAL: (30, 30)}, ("good", "defect"))
    store = LocalStore(str(tmp_path))
    names = manifest.read_table(["sample_id"])["sample_id"].to_pylist()
    record = new_run(store, names, slice_rows=len(names))
    finish_slice(store, record, "0-000000", rejected=[name for name in names if name.startswith(unreadable)])
    publish(RunFolder(store, record.run_id), record, read_records(RunFolder(store, record.run_id)))
    with pytest.raises(DataError, match=message):
        Prober(store, manifest, CONFIG, Silent()).features(SET_ID)


def test_features_tell_which_of_the_rows_that_judge_they_are_of(tmp_path: Path) -> None:
    manifest = frozen_rows(tmp_path, {Split.TRAIN: (10, 10), Split.VAL: (30, 30)}, ("good", "defect"))
    store = LocalStore(str(tmp_path))
    prober = Prober(store, manifest, CONFIG, Silent())
    lost = prober.rows.judged["sample_id"][7].as_py()
    names = manifest.read_table(["sample_id"])["sample_id"].to_pylist()
    record = new_run(store, names, slice_rows=len(names))
    finish_slice(store, record, "0-000000", rejected=[lost])
    publish(RunFolder(store, record.run_id), record, read_records(RunFolder(store, record.run_id)))
    features = prober.features(SET_ID)
    assert features.places_M.tolist() == [place for place in range(60) if place != 7]
    assert prober.judge(features).places_M.tolist() == features.places_M.tolist()


def test_a_probe_that_is_always_right_is_not_sure_of_the_next_row() -> None:
    top1 = JudgedHead(np.ones(33, np.bool_), np.ones(33), np.arange(33), C=1.0, seconds=0.0).top1
    assert top1.estimate == top1.high == 1
    assert top1.low == pytest.approx(0.896, abs=0.001)


@pytest.mark.parametrize(("num_val", "has_val"), [(40, True), (10, False), (0, False)])
def test_configs_choose_their_c_by_val_only_where_val_can_judge_and_are_measured_on_it_where_it_is_there(
    tmp_path: Path, num_val: int, has_val: bool
) -> None:
    counts = {Split.TRAIN: (60, 60), Split.VAL: (num_val, num_val)}
    manifest = frozen_rows(tmp_path, counts, ("good", "defect"))
    store = LocalStore(str(tmp_path))
    gatherer = Gatherer(store, manifest, CONFIG, Prober(store, manifest, CONFIG, Silent()))
    look = cached_look(store, manifest, {})
    top = look.probes.top.model_copy(update={"tap": "pooled"})
    record = fetch_backbone(store, look.record.config)
    look = replace(look, record=record, probes=look.probes.model_copy(update={"taps": [top]}))
    evidence = gatherer._evidence(CONFIG.candidates[0], look, look, is_best=True, shrink=AS_MEASURED)
    assert evidence.has_val is has_val
    assert evidence.has_held_out is (num_val > 0)
