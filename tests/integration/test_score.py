"""`convoy score` on a real Ray: every row ends once, equals what evaluate and cache say, and is never paid twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pytest
import torch

from cache_jobs import CacheJob, cached_features, made_job, write_digits
from command_lines import convoy_here, convoy_json_here, settings_arguments
from convoy.storage.runs import open_pointers, run_ids
from convoy.storage.stores import open_store
from made_bundles import made_classifier, write_classifier

pytestmark = pytest.mark.integration

NUM_IMAGES = 96
TWO_MEMBERS = "ensemble={members: [{bundle: one}, {bundle: two}]}"
FP32 = "extraction={batch_size: 16, slice_rows: 16, precision: fp32, dtype: float32}"


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, ray_cluster: dict[str, str]) -> CacheJob:
    """96 digits, one of them damaged, and two bundles."""
    made = made_job(tmp_path_factory.mktemp("score"), num_images=NUM_IMAGES)
    store = open_store(made.workspace)
    for seed, name in enumerate(("one", "two")):
        write_classifier(store, name, made_classifier(store, seed))
    return replace(made, verb="score", settings=("dataset=digits", "bundle=one", FP32))


def rows_of(workspace: str, run: str) -> pa.Table:
    folder = Path(workspace, "runs", run, "predictions")
    return pads.dataset(folder, partitioning="hive").to_table().sort_by("sample_id")


@pytest.fixture(scope="module")
def report(job: CacheJob, ray_cluster: dict[str, str]) -> dict[str, Any]:
    return job.changed("columns.outputs=logits", "columns.features=f6").run_here()


def test_every_row_ends_once_in_results_or_rejects(job: CacheJob, report: dict[str, Any]) -> None:
    assert (report["inputs"], report["results"], report["rejects"]) == (NUM_IMAGES, NUM_IMAGES - 1, 1)
    assert report["reject_codes"] == {"truncated": 1}
    rows = rows_of(job.workspace, report["run"])
    assert len(set(rows["sample_id"].to_pylist())) == NUM_IMAGES - 1
    proof = job.verify(report["run"])
    assert proof["ok"], proof["problems"]
    assert (proof["inputs"], proof["results"], proof["rejects"]) == (NUM_IMAGES, NUM_IMAGES - 1, 1)


def test_the_same_command_again_scores_nothing(
    job: CacheJob, report: dict[str, Any], ray_cluster: dict[str, str]
) -> None:
    again = job.changed("columns.outputs=logits", "columns.features=f6").run_here()
    assert (again["run"], again["recomputed"], again["results"]) == (report["run"], 0, NUM_IMAGES - 1)


def test_logits_are_the_log_probabilities_of_an_evaluation(
    job: CacheJob, report: dict[str, Any], ray_cluster: dict[str, str]
) -> None:
    settings = settings_arguments("splits=[train, val, test]", FP32)
    arguments = ("one", "--dataset", "digits", "--workspace", job.workspace, *settings)
    evaluation = convoy_json_here("evaluate", *arguments)
    expected = rows_of(job.workspace, evaluation["run"])
    rows = rows_of(job.workspace, report["run"])
    assert rows["sample_id"].to_pylist() == expected["sample_id"].to_pylist()
    assert rows["pred"].to_pylist() == expected["pred"].to_pylist()
    logits_NK = torch.tensor(expected["logits"].to_pylist()).log_softmax(dim=1)
    assert np.allclose(np.array(rows["logits"].to_pylist()), logits_NK, atol=1e-4)


def test_features_of_the_same_pass_are_those_of_the_cache(
    job: CacheJob, report: dict[str, Any], ray_cluster: dict[str, str]
) -> None:
    backbone = (
        "{arch: lenet5, weights: random, seed: 0, num_classes: 10, preset: {resize_px: null, crop_px: 32}}"
    )
    settings = settings_arguments("dataset=digits", f"backbone={backbone}", "taps=[f6]", FP32)
    cached = convoy_json_here("cache", "--workspace", job.workspace, *settings)
    (set_id,) = cached["sets"].values()
    expected = cached_features(job.workspace, set_id)
    rows = rows_of(job.workspace, report["run"])
    features = dict(zip(rows["sample_id"].to_pylist(), rows["features"].to_pylist(), strict=True))
    assert features.keys() == expected.keys()
    for sample_id, features_D in features.items():
        assert np.allclose(features_D, expected[sample_id], atol=1e-5)


def test_an_ensemble_over_crops_lands_in_folders_by_split(job: CacheJob, ray_cluster: dict[str, str]) -> None:
    committee = job.changed(
        "bundle=null",
        "ensemble={members: [{bundle: one}, {bundle: two, weight: 2}]}",
        "crops=flip",
        "partition_by=split",
        "columns.outputs=probabilities",
        "name=by-split",
    )
    report = committee.run_here()
    assert report["results"] + report["rejects"] == report["inputs"] == NUM_IMAGES
    rows = rows_of(job.workspace, report["run"])
    assert set(rows["split"].to_pylist()) == {"train", "val", "test"}
    assert np.allclose(np.array(rows["probabilities"].to_pylist()).sum(axis=1), 1, atol=1e-5)
    proof = job.verify(report["run"])
    assert proof["ok"], proof["problems"]


def test_images_without_labels_are_scored_from_their_source(
    job: CacheJob, tmp_path: Path, ray_cluster: dict[str, str]
) -> None:
    write_digits(tmp_path / "unsorted", 20)
    arguments = (
        "one",
        "--source",
        str(tmp_path / "unsorted"),
        "--name",
        "unsorted",
        "--workspace",
        job.workspace,
    )
    settings = settings_arguments("reading.kind=images", FP32)
    report = convoy_json_here("score", *arguments, *settings)
    assert (report["inputs"], report["results"], report["rejects"]) == (20, 20, 0)
    rows = rows_of(job.workspace, report["run"])
    assert rows["label"].null_count == rows["label_name"].null_count == 20


def test_a_dry_run_says_what_the_run_will_take_and_the_run_keeps_both(
    job: CacheJob, ray_cluster: dict[str, str]
) -> None:
    scoring = job.changed("bundle=two", "name=forecast", "prices={per_hour: 2.0}")
    store = open_store(job.workspace)
    before = run_ids(store), open_pointers(store)
    finished = convoy_here(*scoring.arguments(), "--dry-run", "--json")
    assert finished.returncode == 0, finished.stderr
    assert (run_ids(store), open_pointers(store)) == before
    report = scoring.run_here()
    assert report["forecast"]["images"] == report["actual"]["images"] == NUM_IMAGES
    assert report["forecast"]["images_per_s"] > 0


def test_a_changed_model_does_not_go_on_with_an_unfinished_scoring(job: CacheJob, tmp_path: Path) -> None:
    killed = job.copied_to(tmp_path).changed("name=changed")
    environment = {"CONVOY_CRASH_POINT": f"slice_collected:2:{tmp_path / 'arrivals'}"}
    assert killed.start(environment).returncode == -9
    assert (tmp_path / "arrivals").stat().st_size >= 2, "the fault did not fire"

    refused = killed.changed("bundle=two", "crops=five").start_here()
    assert refused.returncode == 2
    assert "crops.policy: was 'center', is 'five'" in refused.stderr
    assert "--new-run" in refused.stderr

    report = killed.run_here()
    assert (report["results"], report["rejects"]) == (NUM_IMAGES - 1, 1)
    assert report["recomputed"] < NUM_IMAGES


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("bundle=null", TWO_MEMBERS, "columns.features=f6"), "no features in common"),
        (("mode=gated",), "no gate"),
        (("source=somewhere",), "give either dataset, or source and name"),
        (("columns.features=nowhere",), "nowhere"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_any_worker_starts(
    job: CacheJob, settings: tuple[str, ...], message: str
) -> None:
    refused = job.changed(*settings).start_here()
    assert refused.returncode == 2
    assert message in refused.stderr
    assert "starting Ray" not in refused.stderr
