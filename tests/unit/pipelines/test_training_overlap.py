"""A model may be measured on its own training rows once a refresh moved them to another split: the report says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from convoy.core.records import Split
from convoy.core.splits import SplitOptions
from convoy.pipelines.classifier_tensors import classifier_files
from convoy.pipelines.committees import CommitteeRecord, EnsembleConfig, configured_committee, open_committee
from convoy.pipelines.training_overlap import count_overlap, overlap_notes
from convoy.storage.bundles import write_bundle
from convoy.storage.datasets import freeze_dataset, open_dataset
from convoy.storage.local_store import LocalStore
from convoy.storage.manifests import Manifest
from convoy.storage.retrains import RetrainFolder, RetrainPlan
from convoy.storage.runs import RunFolder, RunRecord
from convoy.vision.head_config import HeadKind
from made_bundles import FP32, made_classifier

IMAGES_A_CLASS = 40
RUN = "20260101-000000-0123abcd"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    for name in ("cats", "dogs"):
        (folder / name).mkdir(parents=True)
        for number in range(IMAGES_A_CLASS):
            (folder / name / f"{number}.jpg").write_bytes(f"{name} {number}".encode())
    return folder


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path / "workspace"))


def freeze(store: LocalStore, images: Path, name: str = "photos", **splits: float) -> Manifest:
    freeze_dataset(store, name, str(images), splits=SplitOptions.model_validate(splits))
    return open_dataset(store, name)


def ids(manifest: Manifest, split: Split) -> set[str]:
    return set(manifest.read_table(["sample_id"], splits=[split])["sample_id"].to_pylist())


def write_trained(store: LocalStore, name: str, manifest: Manifest, *, seed: int = 0) -> CommitteeRecord:
    """A probe as `convoy train` leaves it: its metrics name the run that has config and version of the dataset."""
    record = RunRecord.new(
        RUN,
        verb="evaluate",
        identity={"dataset": "photos", "dataset_fingerprint": manifest.fingerprint},
        config={"strategy": "linear_probe", "dataset": "photos"},
        outputs={},
        groups=(),
    )
    RunFolder(store, RUN).write_record(record)
    return write_model(store, name, {"run": RUN}, seed=seed)


def write_model(
    store: LocalStore, name: str, metrics: dict[str, object], *, head: bool = True, seed: int = 0
) -> CommitteeRecord:
    kind = HeadKind.SOFTMAX if head else None
    files = classifier_files(store, made_classifier(store, seed, classes=("cats", "dogs"), head=kind))
    described = {"metrics.json": json.dumps(metrics).encode(), "README.md": b"# made\n"}
    return open_committee(store, str(write_bundle(store, name, {**files, **described})))


def test_rows_that_were_training_rows_are_counted_by_the_split_that_they_were_in(
    store: LocalStore, images: Path
) -> None:
    before = freeze(store, images)
    after = freeze(store, images, seed=1)
    test = ids(after, Split.TEST)
    learnt, chosen_by = (len(test & ids(before, split)) for split in (Split.TRAIN, Split.VAL))
    assert learnt
    assert chosen_by
    assert count_overlap(after, [Split.TEST], before) == (len(test), learnt, chosen_by)
    assert count_overlap(before, [Split.TEST], before)[1:] == (0, 0)


def test_a_training_row_under_another_name_is_counted_too(store: LocalStore, images: Path) -> None:
    versions = []
    for name in ("first", "second"):
        samples = images.parent / "samples.csv"
        split = "train" if name == "first" else "test"
        samples.write_text(f"id,path,label,split\n{name},images/cats/0.jpg,cats,{split}\n")
        versions.append(freeze(store, samples, val_fraction=0, test_fraction=0))
    before, after = versions
    assert count_overlap(after, [Split.TEST], before) == (1, 1, 0)


def test_every_batch_of_the_other_version_is_looked_at(
    store: LocalStore, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convoy.storage.manifests.ROWS_PER_GROUP", 4)
    monkeypatch.setattr("convoy.pipelines.training_overlap._BATCHES_A_PASS", 3)
    before, after = freeze(store, images), freeze(store, images, seed=1)
    learnt = len(ids(after, Split.TEST) & ids(before, Split.TRAIN))
    assert count_overlap(after, [Split.TEST], before)[1] == learnt > 0


def test_each_member_that_learnt_evaluated_rows_is_named_with_their_number(
    store: LocalStore, images: Path
) -> None:
    before = freeze(store, images)
    write_trained(store, "probe", before)
    other = write_model(store, "other", {}, seed=1)
    members = {"members": [{"bundle": "probe"}, {"bundle": "other"}]}
    committee = configured_committee(store, EnsembleConfig.model_validate(members), FP32)
    assert overlap_notes(store, before, "photos", [Split.TEST], committee) == []
    after = freeze(store, images, test_fraction=0.3)
    learnt = len(ids(after, Split.TEST) & ids(before, Split.TRAIN))
    (note,) = overlap_notes(store, after, "photos", [Split.TEST], committee)
    assert note.startswith("probe@")
    assert f"{learnt} of the {len(ids(after, Split.TEST))} rows" in note
    assert "rain it again" in note
    assert overlap_notes(store, after, "photos", [Split.TEST], other) == []


def test_nothing_is_said_of_new_images_and_of_other_datasets(store: LocalStore, images: Path) -> None:
    committee = write_trained(store, "probe", freeze(store, images))
    (images / "cats" / "new.jpg").write_bytes(b"new")
    assert overlap_notes(store, freeze(store, images), "photos", [Split.TEST], committee) == []
    others = freeze(store, images, "others", seed=1)
    assert overlap_notes(store, others, "others", [Split.TEST], committee) == []


def test_a_pretrained_network_learnt_no_row(store: LocalStore, images: Path) -> None:
    before = freeze(store, images)
    write_trained(store, "probe", before)
    as_is = write_model(store, "as-is", {"run": RUN}, head=False)
    assert overlap_notes(store, freeze(store, images, seed=1), "photos", [Split.TEST], as_is) == []


def test_a_retrained_model_is_known_by_the_plan_of_its_retraining(store: LocalStore, images: Path) -> None:
    before = freeze(store, images)
    plan = RetrainPlan(
        date="2026-11-27",
        fingerprint=before.fingerprint,
        previous_fingerprint=None,
        champion=None,
        config={"dataset": "photos"},
    )
    RetrainFolder(store, "daily").write_plan(plan)
    lineage = {"retraining": "daily/2026-11-27", "dataset fingerprint": before.fingerprint}
    committee = write_model(store, "daily", {"lineage": lineage})
    (note,) = overlap_notes(store, freeze(store, images, seed=1), "photos", [Split.TEST], committee)
    assert note.startswith("daily@")


def test_a_version_that_is_gone_is_said_to_be_gone(store: LocalStore, images: Path) -> None:
    before = freeze(store, images)
    committee = write_trained(store, "probe", before)
    after = freeze(store, images, seed=1)
    shutil.rmtree(Path(store.root_uri) / "datasets/photos/versions" / before.fingerprint)
    (note,) = overlap_notes(store, after, "photos", [Split.TEST], committee)
    assert "no longer in the workspace" in note
