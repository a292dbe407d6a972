"""`convoy train` with a teacher on a real Ray: a model or an ensemble, asked once, heard by networks and heads."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache_jobs import freeze, write_digits
from convoy.pipelines.committees import CommitteeMember, committee_of, open_committee, write_ensemble
from convoy.storage.bundles import open_bundle
from convoy.storage.predictions import list_array
from convoy.storage.runs import RunFolder
from convoy.storage.stores import open_store
from convoy.storage.teacher_logits import read_teacher_logits
from train_jobs import LENET, NUM_ROWS, TrainJob, frozen_digits, timeless, write_splits

pytestmark = pytest.mark.integration

ASKING = "asking the teacher"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory, ray_cluster: Mapping[str, str]) -> TrainJob:
    """LeNet-5 from scratch on digits in three splits, with one thread a worker; tests change it."""
    workspace = frozen_digits(tmp_path_factory.mktemp("digits"))
    settings = (
        "workers.cpus_per_worker=1",
        f"backbone={LENET}",
        "strategy=from_scratch",
        "epochs=2",
        "learning_rate=0.02",
        "recipe={batch_size: 16, precision: fp32}",
        "extraction={precision: fp32, dtype: float32}",
    )
    return TrainJob(workspace, settings, ray_cluster)


def probe(job: TrainJob, name: str, *settings: str) -> TrainJob:
    """A softmax head on a random LeNet-5: trained in a second, and better than chance."""
    as_probe = ("strategy=linear_probe", "epochs=null", "learning_rate=null", "tap=f6", "head.C=[0.01]")
    return job.changed(f"name={name}", *as_probe, *settings)


@pytest.fixture(scope="module")
def ensemble(digits: TrainJob) -> str:
    """The name of an ensemble of two heads on other features."""
    store = open_store(digits.workspace)
    members = []
    for seed in (0, 1):
        report = probe(digits, f"teacher{seed}", f"backbone.seed={seed}").run_here()
        (member,) = open_committee(store, report["bundle"]).members
        members.append(
            CommitteeMember(
                name=member.name,
                digest=member.digest,
                bundle=member.bundle,
                classifier=member.classifier,
                weight=1.0,
            )
        )
    write_ensemble(store, "teachers", committee_of(members), metrics={}, card="two heads")
    return "teachers"


def taught(job: TrainJob, name: str, teacher: str, *settings: str) -> TrainJob:
    return job.changed(
        f"name={name}", f"distill={{teacher: {teacher}, temperature: 2, weight: 0.8}}", *settings
    )


@pytest.fixture(scope="module")
def student(digits: TrainJob, ensemble: str) -> dict[str, Any]:
    return taught(digits, "student", ensemble).run_here()


def test_a_student_hears_what_the_ensemble_says_of_each_image(
    digits: TrainJob, ensemble: str, student: dict[str, Any]
) -> None:
    store = open_store(digits.workspace)
    pinned = str(open_bundle(store, ensemble).ref)
    assert f"distilled from {pinned} at temperature 2, weight 0.8" in student["notes"]
    card = open_bundle(store, student["bundle"]).files["README.md"].decode()
    assert f"- teacher: `{pinned}`" in card
    folder = RunFolder(store, student["train_run"])
    record = folder.record()
    assert record is not None
    assert record.identity["config"]["distill"]["teacher"] == pinned
    heard = read_teacher_logits(store, folder.key("input/teacher.parquet"))
    ids = store.open_parquet(folder.key("input/train.parquet")).read()["sample_id"].to_pylist()
    assert heard.shape == (NUM_ROWS["train"], 10)
    # What was committed of the same images, of which the softmax alone counts.
    said: dict[str, np.ndarray] = {}
    for path in Path(digits.workspace, "runs").glob("*/predictions/*.parquet"):
        table = store.open_parquet(str(path.relative_to(digits.workspace))).read()
        if set(table["model_digest"].to_pylist()) == {open_committee(store, ensemble).digest}:
            said |= dict(zip(table["sample_id"].to_pylist(), list_array(table["logits"]), strict=True))
    for name, logits_K in zip(ids, heard, strict=True):
        np.testing.assert_allclose(logits_K, said[name] - said[name].max(), atol=0.01)


def test_another_training_of_the_same_rows_does_not_ask_again(
    digits: TrainJob, ensemble: str, student: dict[str, Any]
) -> None:
    runs = {path.name for path in Path(digits.workspace, "predictions").iterdir()}
    again = taught(digits, "student", ensemble).run_here()
    assert again["bundle"] == student["bundle"]
    other = taught(digits, "other", ensemble, "distill.weight=1").run_here()
    assert other["bundle"].partition("@")[2] != student["bundle"].partition("@")[2]
    assert {path.name for path in Path(digits.workspace, "predictions").iterdir()} == runs


@pytest.mark.slow
def test_a_student_is_not_what_it_would_be_without_its_teacher(
    digits: TrainJob, student: dict[str, Any]
) -> None:
    alone = digits.changed("name=alone").run_here()
    assert alone["bundle"].partition("@")[2] != student["bundle"].partition("@")[2]


@pytest.mark.slow
def test_two_workers_hear_what_one_does(digits: TrainJob, ensemble: str, student: dict[str, Any]) -> None:
    report = taught(digits, "two", ensemble, "workers.num_workers=2").run_here()
    for found, expected in zip(report["history"], student["history"], strict=True):
        for name in ("train_loss", "val_nll"):
            assert found[name] == pytest.approx(expected[name], rel=1e-4), name
        assert found["images"] == expected["images"]


def test_split_ingest_brings_the_very_targets_of_the_fused_one(
    digits: TrainJob, ensemble: str, student: dict[str, Any]
) -> None:
    report = taught(digits, "split", ensemble, "workers={ingest: split, cpus_per_worker: 1}").run_here()
    assert timeless(report["history"]) == timeless(student["history"])
    assert report["model_digest"] == student["model_digest"]


def test_heads_on_cached_features_are_taught_too(digits: TrainJob, ensemble: str) -> None:
    """Both the probe, and the head that a fine-tuning begins with."""
    heads = {}
    for weight in (0.5, 1):
        job = probe(digits, "head", f"distill={{teacher: {ensemble}, weight: {weight}}}")
        heads[weight] = job.run_here()
    assert heads[1]["bundle"] != heads[0.5]["bundle"]
    assert probe(digits, "head").run_here()["bundle"] not in {report["bundle"] for report in heads.values()}
    tuned = taught(digits, "tuned", ensemble, "strategy=fine_tune", "freeze_depth=c1").run_here()
    assert tuned["head"]["num_rows"] == NUM_ROWS["train"]
    assert len(tuned["history"]) == 2


def test_images_that_the_teacher_cannot_use_are_left_out_and_counted(
    digits: TrainJob, tmp_path: Path
) -> None:
    write_splits(tmp_path / "images")
    (tmp_path / "images" / "train" / "3" / "damaged.jpg").write_bytes(
        b"\xff\xd8\xff\xe0 not much of an image"
    )
    job = replace(digits, workspace=str(tmp_path / "workspace"))
    assert freeze(tmp_path / "images", job.workspace)["splits"]["train"] == NUM_ROWS["train"] + 1
    probe(job, "teacher").run_here()
    report = taught(job, "student", "teacher").run_here()
    assert sum(report["train_rejects"].values()) == 1
    assert report["num_train_rows"] == NUM_ROWS["train"]
    assert any(
        "1 training images are left out: the teacher could not use them" in one for one in report["notes"]
    )
    assert [epoch["rejects"] for epoch in report["history"]] == [0, 0]


def test_what_cannot_be_taught_is_refused_before_any_worker_starts(
    digits: TrainJob, ensemble: str, tmp_path: Path
) -> None:
    svm = probe(digits, "svm", "head.kind=linear_svm").run_here()["bundle"]
    write_digits(tmp_path / "animals" / "train", 30)
    (tmp_path / "animals" / "train" / "8").rename(tmp_path / "animals" / "train" / "dog")
    freeze(tmp_path / "animals", digits.workspace, name="animals")
    cases = {
        "there is no model 'nobody'": taught(digits, "refused", "nobody"),
        "the teacher does not know 1 classes of the dataset: dog": taught(
            digits, "refused", ensemble, "dataset=animals"
        ),
        "the scores of the teacher are margins of a linear SVM": taught(digits, "refused", svm),
        "distill teaches networks and softmax heads": probe(
            digits, "refused", f"distill={{teacher: {ensemble}}}", "head.kind=mlp"
        ),
    }
    for message, job in cases.items():
        finished = job.start_here()
        assert finished.returncode != 0
        assert finished.stdout == ""
        assert message in finished.stderr
        assert "starting the training workers" not in finished.stderr
        assert not Path(digits.workspace, "models", "refused").exists()
        shutil.rmtree(Path(digits.workspace, "runs", "open"), ignore_errors=True)


def test_an_unfinished_training_keeps_its_teacher_and_is_refused_another(
    digits: TrainJob, ensemble: str
) -> None:
    wild = taught(digits, "wild", "teacher0", "learning_rate=1e38")
    assert "no finite number" in wild.start_here().stderr
    newer = probe(digits, "teacher0", "head.C=[1.0]").run_here()["bundle"]
    assert "no finite number" in wild.start_here().stderr
    refused = taught(digits, "wild", newer, "learning_rate=1e38").start_here()
    assert refused.returncode == 2
    assert "config.distill.teacher" in refused.stderr
