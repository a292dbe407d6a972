from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from PIL import Image

from convoy.core.crop_policies import Averaging, CropPlan, CropPolicy, crop_views
from convoy.core.errors import ConfigError, DataError
from convoy.core.fingerprints import canonical_json
from convoy.core.progress import Silent
from convoy.pipelines.dataset import DatasetConfig, freeze
from convoy.pipelines.ensemble_building import build_ensemble
from convoy.pipelines.ensemble_candidates import Candidate, paired_rows, read_candidates
from convoy.pipelines.ensemble_choice import EnsembleSettings
from convoy.storage.commits import RunManifest
from convoy.storage.datasets import open_dataset
from convoy.storage.local_store import LocalStore
from convoy.storage.manifests import Manifest
from convoy.storage.member_predictions import member_output, write_member_predictions
from convoy.storage.runs import RunFolder, RunRecord, SliceGroup
from made_bundles import DIGITS, FP32, made_classifier, write_classifier
from made_runs import slice_record

ROWS = ("a", "b", "c", "d")
LABELS = (0, 1, 2, 9)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path / "workspace"))


@pytest.fixture
def manifest(store: LocalStore, tmp_path: Path) -> Manifest:
    return frozen(store, tmp_path, ("train", "val"))


def frozen(store: LocalStore, tmp_path: Path, splits: Sequence[str]) -> Manifest:
    """A dataset of one image a split."""
    for split in splits:
        path = tmp_path / "images" / split / "0" / "image.png"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(path)
    source = str(tmp_path / "images")
    freeze(DatasetConfig(workspace=store.root_uri, source=source, name="made"), progress=Silent())
    return open_dataset(store, "made")


def candidate(
    store: LocalStore,
    manifest: Manifest,
    name: str,
    *,
    rows: Sequence[str] = ROWS,
    classes: tuple[str, ...] = DIGITS,
    policy: CropPolicy = CropPolicy.FLIP,
    **identity: object,
) -> Candidate:
    """A bundle, and a published run with predictions: the logit of class k in view v of row n is 100 v + 10 n + k."""
    bundle = write_classifier(store, name, made_classifier(store, len(name), classes=classes))
    plan, output = CropPlan(policy=policy), member_output(0)
    folder = RunFolder(store, f"run-{name}")
    folder.write_record(
        RunRecord.new(
            folder.run_id,
            verb="evaluate",
            identity={
                "dataset_fingerprint": manifest.fingerprint,
                "splits": ["val"],
                "crops": plan.model_dump(mode="json"),
                **identity,
            },
            config={},
            outputs={output: folder.key(f"{output}/")},
            groups=(SliceGroup(outputs=(output,), num_rows=len(rows), num_slices=1),),
        )
    )
    places = np.array([ROWS.index(row) for row in rows])
    class_K = np.array([DIGITS.index(name) for name in classes])
    views_V11 = 100 * np.arange(len(crop_views(plan)))[:, None, None]
    logits_VNK = (views_V11 + 10 * places[None, :, None] + class_K).astype(np.float32)
    labels = [classes.index(DIGITS[LABELS[place]]) for place in places]
    part = write_member_predictions(
        store,
        folder.key(f"{output}/0-000000-a0.parquet"),
        pa.table({"sample_id": list(rows)}),
        labels=pa.array(labels, pa.int32()),
        logits_NVK=logits_VNK.transpose(1, 0, 2),
        metadata={},
    )
    record = slice_record("0-000000", {output: part}, num_results=len(rows), run_id=folder.run_id)
    published = RunManifest(run_id=folder.run_id, slices=(record,))
    store.put(folder.key("manifest.json"), canonical_json(published))
    return Candidate(
        bundle=str(bundle), predictions_run=folder.run_id, seconds_per_pass=0.5, seconds_once=0.1
    )


def test_rows_that_all_predicted_are_joined_by_id_and_classes_by_name(
    store: LocalStore, manifest: Manifest
) -> None:
    candidates = [
        candidate(store, manifest, "one", rows=("d", "b", "a")),
        candidate(store, manifest, "other", rows=("a", "c", "d"), classes=DIGITS[::-1]),
    ]
    predictions, networks = read_candidates(store, manifest, candidates, Averaging.PROBABILITIES)
    assert [[member.name for member in members] for members in networks] == [
        [one.bundle] for one in candidates
    ]
    assert predictions.labels_N.tolist() == [0, 9]
    expected_NK = np.array([[0], [30]]) + np.arange(10)
    for member in range(2):
        for view in range(2):
            np.testing.assert_array_equal(predictions.logits_MVNK[member, view], 100 * view + expected_NK)
    assert predictions.seconds_per_pass_M == (0.5, 0.5)
    assert predictions.seconds_once_M == (0.1, 0.1)
    assert predictions.macs_M[0] > 0


def test_predictions_for_which_memory_is_short_are_the_same_on_disk(
    store: LocalStore, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidates = [
        candidate(store, manifest, "one", rows=("d", "b", "a")),
        candidate(store, manifest, "other", rows=("a", "c", "d")),
    ]
    in_memory, _ = read_candidates(store, manifest, candidates, Averaging.PROBABILITIES)
    monkeypatch.setattr("convoy.core.large_arrays.free_memory_bytes", lambda: 0)
    on_disk, _ = read_candidates(store, manifest, candidates, Averaging.PROBABILITIES)
    np.testing.assert_array_equal(on_disk.logits_MVNK, in_memory.logits_MVNK)
    assert [isinstance(_owner(one.logits_MVNK), np.memmap) for one in (in_memory, on_disk)] == [False, True]


def _owner(array: NDArray[np.float32]) -> object:
    """The array of which this one is a view."""
    owner: object = array
    while isinstance(owner, np.ndarray) and isinstance(owner.base, np.ndarray):
        owner = owner.base
    return owner


def test_an_ensemble_says_how_many_rows_chose_it_and_measured_its_gate(
    store: LocalStore, manifest: Manifest
) -> None:
    candidates = [
        candidate(store, manifest, "one"),
        candidate(store, manifest, "other", rows=("a", "c", "d")),
    ]
    report = build_ensemble(
        store,
        manifest,
        candidates,
        EnsembleSettings(gate=0.9),
        name="both",
        dataset="made",
        extraction=FP32,
        progress=Silent(),
    )
    assert report.num_val_rows == 3
    assert report.gate is not None
    # Three rows are too few for a gate that believes anything.
    for worth in (report.gate, *report.gate.curve):
        assert worth.test is None
        assert worth.cross_fitted is not None
        assert (worth.cross_fitted.agreement, worth.cross_fitted.speedup) == (1, 1)


def test_the_models_of_all_folds_are_one_candidate_whose_rows_each_predicted_one(
    store: LocalStore, manifest: Manifest
) -> None:
    left = candidate(store, manifest, "left", rows=("a", "c"))
    right = candidate(store, manifest, "right", rows=("b", "d"), classes=DIGITS[::-1])
    folds = replace(left, other_folds=((right.bundle, right.predictions_run),))
    single = candidate(store, manifest, "single")
    predictions, networks = read_candidates(store, manifest, [folds, single], Averaging.PROBABILITIES)
    assert [[member.name for member in members] for members in networks] == [
        [left.bundle, right.bundle],
        [single.bundle],
    ]
    np.testing.assert_array_equal(predictions.logits_MVNK[0], predictions.logits_MVNK[1])
    assert predictions.labels_N.tolist() == list(LABELS)
    assert predictions.num_networks_M == (2, 1)
    assert predictions.macs_M[0] == 2 * predictions.macs_M[1]


def test_crops_are_the_largest_that_all_kept(store: LocalStore, manifest: Manifest) -> None:
    candidates = [
        candidate(store, manifest, "ten", policy=CropPolicy.TEN),
        candidate(store, manifest, "flipped", policy=CropPolicy.FLIP),
    ]
    predictions, _ = read_candidates(store, manifest, candidates, Averaging.LOGITS)
    assert predictions.plan == CropPlan(policy=CropPolicy.FLIP)
    # The centre crop and its mirror image are the fifth and the tenth of ten.
    assert predictions.logits_MVNK[0, :, 0, 0].tolist() == [400, 900]
    assert predictions.logits_MVNK[1, :, 0, 0].tolist() == [0, 100]


def test_crops_that_no_two_share_are_refused(store: LocalStore, manifest: Manifest) -> None:
    candidates = [
        candidate(store, manifest, "ten", policy=CropPolicy.TEN),
        candidate(store, manifest, "multiscale", policy=CropPolicy.MULTISCALE),
    ]
    with pytest.raises(ConfigError, match="no crops in common"):
        read_candidates(store, manifest, candidates, Averaging.PROBABILITIES)


def test_predictions_of_another_version_of_the_dataset_are_refused(
    store: LocalStore, manifest: Manifest
) -> None:
    candidates = [
        candidate(store, manifest, "new"),
        candidate(store, manifest, "former", dataset_fingerprint="0" * 32),
    ]
    with pytest.raises(DataError, match="another version of the dataset"):
        read_candidates(store, manifest, candidates, Averaging.PROBABILITIES)


@pytest.mark.parametrize("splits", [["test", "val"], "all"])
def test_test_rows_choose_nothing(store: LocalStore, tmp_path: Path, splits: object) -> None:
    manifest = frozen(store, tmp_path, ("val", "test"))
    tempting = candidate(store, manifest, "tempting", splits=splits)
    with pytest.raises(DataError, match="test rows, which must choose nothing"):
        read_candidates(store, manifest, [tempting], Averaging.PROBABILITIES)


def test_candidates_of_other_classes_are_refused(store: LocalStore, manifest: Manifest) -> None:
    candidates = [
        candidate(store, manifest, "digits"),
        made_stranger(store, manifest),
    ]
    with pytest.raises(ConfigError, match="the same classes"):
        read_candidates(store, manifest, candidates, Averaging.PROBABILITIES)


def made_stranger(store: LocalStore, manifest: Manifest) -> Candidate:
    known = candidate(store, manifest, "known")
    classifier = made_classifier(store, 3, classes=(*DIGITS[:-1], "ten"))
    stranger = write_classifier(store, "stranger", classifier)
    return replace(known, bundle=str(stranger))


def test_rows_that_nobody_shares_are_no_validation_set(store: LocalStore, manifest: Manifest) -> None:
    candidates = [
        candidate(store, manifest, "left", rows=("a", "b")),
        candidate(store, manifest, "right", rows=("c", "d")),
    ]
    with pytest.raises(DataError, match="no validation row was predicted by all"):
        read_candidates(store, manifest, candidates, Averaging.PROBABILITIES)


def test_no_candidate_is_an_error_that_says_so(store: LocalStore, manifest: Manifest) -> None:
    with pytest.raises(ConfigError, match="needs a candidate"):
        read_candidates(store, manifest, [], Averaging.PROBABILITIES)


def test_paired_rows_are_those_of_every_list_in_one_order() -> None:
    ids, places = paired_rows([["c", "a", "b"], ["b", "c", "z"]])
    assert ids.tolist() == ["b", "c"]
    assert [one.tolist() for one in places] == [[2, 0], [0, 1]]
    ids, places = paired_rows([["c", "a"]])
    assert (ids.tolist(), [one.tolist() for one in places]) == (["a", "c"], [[1, 0]])
